"""What may befall a run: whatever it is, nothing that was saved is lost, and the run goes on as if nothing had been.

The reference is `whole`, a run that nothing befell; the others must end with its metrics.jsonl and its parameters, bit
for bit. docs/reliability.md has the table of faults.
"""

import functools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mtl_sparse.jobs import evaluate, train
from mtl_sparse.report import records
from mtl_sparse.runtime import files, logs
from mtl_sparse.runtime.errors import Stopped, UserError, as_os_error
from mtl_sparse.training import checkpoints, evaluation, loop, results
from mtl_sparse.training import folder as folder_lib
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import step as step_lib
from tests.conftest import tiny

ROOT = pathlib.Path(__file__).parents[2]


def lines(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


def state(workdir, kind="latest"):
    saved = checkpoints.Checkpoints(workdir)
    leaves, progress, folder = saved.read(kind)
    saved.close()
    return int(folder.name), {name: leaf.tobytes() for name, leaf in leaves.items()}, progress


def newest(workdir):
    steps = [path for path in (workdir / "checkpoints" / "latest").iterdir() if path.name.isdecimal()]
    return max(steps, key=lambda path: int(path.name))


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Compiles the step and the evaluation once for all runs of this file, and leaves out what comes after training."""
    if "slow" in request.keywords:
        return
    monkeypatch.setattr(loop, "make_train_step", _one_step)
    monkeypatch.setattr(train, "Evaluator", _one_evaluator)
    monkeypatch.setattr(results, "write", lambda *_: {})
    monkeypatch.setattr(results.Best, "summary", lambda _: "")


_make_train_step, _evaluator, _made = step_lib.make_train_step, evaluation.Evaluator, {}


def _one_step(run):
    step = _made.setdefault((run.total_steps, run.config.run.skip_not_finite > 0), _make_train_step(run))
    return functools.partial(_call_hook, step)


def _one_evaluator(run):
    return _made.setdefault("evaluator", _evaluator(run))


_hook = {}  # step -> what befalls the run while that step is computed


def _call_hook(step, state, batch):
    out = step(state, batch)
    _hook.pop(int(out[0].step), lambda: None)()
    return out


@pytest.fixture
def befalls():
    """A dictionary: step -> function that is called once, when that step has been computed."""
    _hook.clear()
    yield _hook
    _hook.clear()


def depth(rooms):
    """Six steps in three epochs of one task, on the front of the backbone alone, which compiles sooner."""
    config = tiny(rooms)
    config.tasks = ("depth",)
    config.model.attach = ("layer1_0",)
    config.train.epochs = 3
    config.run.log_every_steps = 3
    return config


@pytest.fixture(scope="module")
def whole(rooms, tmp_path_factory):
    """Folder of a run that nothing befell."""
    workdir = tmp_path_factory.mktemp("whole")
    run = setup_lib.setup(depth(rooms))
    folder_lib.claim(workdir, run.config, run.data)
    saved = checkpoints.Checkpoints(workdir)
    loop.fit(run, workdir, saved)
    saved.close()
    return workdir


def assert_ends_as(whole, workdir):
    assert lines(workdir) == lines(whole)
    for kind in checkpoints.KINDS:
        assert state(workdir, kind) == state(whole, kind)


def raises_now(error):
    def fault():
        raise error

    return fault


@pytest.mark.parametrize("every", [1, 100])
def test_a_signal_saves_the_step_and_the_run_goes_on(whole, rooms, tmp_path, befalls, every):
    """Also between two lines of the log and two checkpoints, and more than once."""
    config = depth(rooms)
    config.run.update(checkpoint_every_steps=every)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for step, number in ((1, signal.SIGTERM), (4, signal.SIGINT), (5, signal.SIGTERM)):
        befalls[step] = functools.partial(os.kill, os.getpid(), number)
        with pytest.raises(Stopped, match=f"stopped at step {step} of 6, as asked; the same command goes on from"):
            train.train(config, tmp_path)
        assert state(tmp_path)[0] == step
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    with pytest.raises(UserError, match="is at step 5 of 6: give its command again"):
        evaluate.run_job(config, tmp_path)
    assert not (tmp_path / "results.json").exists(), "which would make it count as finished"
    train.train(config, tmp_path)
    if every == 1:
        assert_ends_as(whole, tmp_path)
    else:  # a checkpoint also writes the line of the log
        assert [json.loads(line)["step"] for line in lines(tmp_path)] == [2, 2, 3, 4, 4, 6, 6]
        assert state(tmp_path) == state(whole)
        single = {row["step"]: row["loss"] for row in map(json.loads, lines(whole)) if row["split"] == "train"}
        means = {row["step"]: row["loss"] for row in map(json.loads, lines(tmp_path)) if row["split"] == "train"}
        for step in (2, 6):  # the run was stopped between the two steps of these lines
            assert means[step] == pytest.approx((single[step - 1] + single[step]) / 2, rel=1e-12)


def test_what_the_loop_remembers_goes_on(rooms, tmp_path, befalls, monkeypatch):
    scores = iter((1.0, 2.0, 3.0))
    monkeypatch.setattr(train, "validation_score", lambda *_: next(scores))
    befalls[3] = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        train.train(depth(rooms), tmp_path)
    train.train(depth(rooms), tmp_path)
    progress = state(tmp_path)[2]
    assert (progress["best"], progress["stale_epochs"], state(tmp_path, "best")[0]) == (1.0, 2, 2)


def test_a_second_ctrl_c_ends_at_once(rooms, tmp_path, befalls):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    befalls[3] = twice
    with pytest.raises(KeyboardInterrupt):
        train.train(depth(rooms), tmp_path)
    assert state(tmp_path)[0] == 2


def test_a_run_that_breaks_anywhere_goes_on(whole, rooms, tmp_path, befalls):
    """Also between its two saves: the best checkpoint of step 2 is written, the latest is still that of step 1."""
    for step in (1, 3, 6):
        befalls[step] = raises_now(RuntimeError(f"step {step}"))
        with pytest.raises(RuntimeError, match=f"step {step}"):
            train.train(depth(rooms), tmp_path)
        if step == 3:
            shutil.rmtree(tmp_path / "checkpoints" / "latest" / "2")
            assert (state(tmp_path)[0], state(tmp_path, "best")[0]) == (1, 2)
    train.train(depth(rooms), tmp_path)
    assert_ends_as(whole, tmp_path)


def flip(path):
    data = bytearray(path.read_bytes())
    for place in range(0, len(data), 64):  # one alone may fall where nothing is read
        data[place] ^= 16
    path.write_bytes(data)


DAMAGE = {
    "bits of the arrays": lambda folder: flip(largest(folder)),
    "arrays cut short": lambda folder: largest(folder).write_bytes(largest(folder).read_bytes()[:1000]),
    "no arrays": lambda folder: shutil.rmtree(folder / "state"),
    "no progress": lambda folder: shutil.rmtree(folder / "progress"),
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", DAMAGE)
def test_of_a_damaged_checkpoint_the_one_before_is_taken(whole, rooms, tmp_path, befalls, caplog, damage):
    befalls[4] = raises_now(RuntimeError)
    with pytest.raises(RuntimeError):
        train.train(depth(rooms), tmp_path)
    assert newest(tmp_path).name == "3"
    DAMAGE[damage](newest(tmp_path))
    train.train(depth(rooms), tmp_path)
    assert "checkpoints/latest/3 is damaged" in caplog.text
    assert [path.name for path in (tmp_path / "checkpoints" / "damaged").iterdir()] == ["latest_3"]
    assert_ends_as(whole, tmp_path)


def test_where_no_checkpoint_is_whole_nothing_is_thrown_away(whole, rooms, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = lines(tmp_path)
    for folder in (tmp_path / "checkpoints" / "latest").iterdir():
        flip(largest(folder))
    for _ in range(2):
        with pytest.raises(UserError, match=r"latest/6 and .*latest/5 is damaged .*no other; put a copy of it back"):
            train.train(depth(rooms), tmp_path)
        assert lines(tmp_path) == before and not (tmp_path / "checkpoints" / "damaged").exists()
    flip(largest(tmp_path / "checkpoints" / "best"))
    with pytest.raises(UserError, match=r"checkpoint .*best/\d is damaged .*put a copy of it back"):
        state(tmp_path, "best")
    assert len(list((tmp_path / "checkpoints" / "best").iterdir())) == 1


def test_a_second_process_on_a_folder_is_refused(whole, rooms, tmp_path, befalls):
    def another():
        with pytest.raises(UserError, match="another process is at work in .*wait until it has ended, or give another"):
            train.train(depth(rooms), tmp_path)
        with pytest.raises(UserError, match="another process is at work"):
            evaluate.run_job(depth(rooms), tmp_path)

    befalls[2] = another
    train.train(depth(rooms), tmp_path)
    assert not befalls
    assert_ends_as(whole, tmp_path)


def not_finite_at(monkeypatch, *steps):
    batches = setup_lib.Batches.train

    def broken(self, start_step):
        for step, batch in enumerate(batches(self, start_step), start_step + 1):
            yield {**batch, "image": batch["image"] * np.float32(np.nan)} if step in steps else batch

    monkeypatch.setattr(setup_lib.Batches, "train", broken)


def test_a_step_that_is_not_finite_stops_with_the_step_named(rooms, tmp_path, monkeypatch):
    not_finite_at(monkeypatch, 3)
    with pytest.raises(UserError, match=r"not finite at step 3 \(.*grad_norm=nan.*checkpoint of step 2 is kept.*skip"):
        train.train(depth(rooms), tmp_path)
    assert state(tmp_path)[0] == 2
    assert max(json.loads(line)["step"] for line in lines(tmp_path)) == 2


def test_steps_that_are_not_finite_are_skipped_and_counted(whole, rooms, tmp_path, monkeypatch, befalls):
    """Two in a row after a checkpoint, one later: parameters, optimizer and statistics stay what they were."""
    config = depth(rooms)
    config.run.skip_not_finite = 2
    config.run.checkpoint_every_steps = 2
    not_finite_at(monkeypatch, 3, 4, 6)
    befalls[4] = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        train.train(config, tmp_path)
    (_, before, _), (step, after, progress) = (_read(tmp_path, step) for step in (2, 4))
    assert step == 4 and (progress["skipped"], progress["skipped_in_a_row"]) == (2, 2)
    assert {name for name in before if before[name] != after[name]} == {"step"}
    train.train(config, tmp_path)
    rows = [json.loads(line) for line in lines(tmp_path)]
    train_rows = [row for row in rows if row["split"] == "train"]
    assert [(row["step"], row["skipped"]) for row in train_rows] == [(2, 0), (3, 1), (4, 2), (6, 3)]
    assert "loss" not in train_rows[1] and np.isfinite(train_rows[3]["loss"])
    assert records.read_metrics(tmp_path)["train"]["loss"][0].tolist() == [2, 6]

    config.run.skip_not_finite = 1
    with pytest.raises(UserError, match="not finite at step 4 .2 steps in a row.; the checkpoint of step 2 is kept"):
        train.train(config, tmp_path / "again")


def _read(workdir, step):
    saved = checkpoints.Checkpoints(workdir)
    leaves, progress = saved._leaves("latest", step)
    saved.close()
    return step, {name: leaf.tobytes() for name, leaf in leaves.items()}, progress


def test_a_clock_that_jumps_changes_nothing(whole, rooms, tmp_path, monkeypatch):
    draw, real = random.Random(0), time.time

    def jumping():
        return real() + draw.choice((-1, 0, 1)) * 86400

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    train.train(depth(rooms), tmp_path)
    assert_ends_as(whole, tmp_path)


def test_a_disk_that_is_full_loses_nothing(whole, rooms, tmp_path, befalls):
    """Here as a limit on the size of a file, which a checkpoint of step 3 and later runs against."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    befalls[3] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as raised, as_os_error(tmp_path):
            train.train(depth(rooms), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.filename
    assert state(tmp_path)[0] in (1, 2), "that of step 2 may have been under way"
    train.train(depth(rooms), tmp_path)
    assert_ends_as(whole, tmp_path)


def test_a_folder_that_becomes_read_only_loses_nothing(whole, rooms, tmp_path, befalls):
    """As root, for whom no folder is read-only, it is the user that changes."""
    folders = [tmp_path / "checkpoints" / kind for kind in checkpoints.KINDS]

    def lock():
        for folder in folders:
            folder.chmod(0o555)
        if os.getuid() == 0:
            os.seteuid(65534)

    befalls[3] = lock
    try:
        with pytest.raises(OSError, match="Permission denied"), as_os_error(tmp_path):
            train.train(depth(rooms), tmp_path)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for folder in folders:
            folder.chmod(0o755)
    assert state(tmp_path)[0] in (1, 2), "that of step 2 may have been under way"
    train.train(depth(rooms), tmp_path)
    assert_ends_as(whole, tmp_path)


def test_a_stretch_that_was_lost_is_not_logged_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "split": "train", "loss": 1}\n{"step": 2, "split": "train", "loss": 2}\n{"step": 3, "spl'
    )
    log = logs.MetricLog(tmp_path, start_step=1)
    log.write(2, "train", {"loss": 5})
    log.close()
    assert [(row["step"], row["loss"]) for row in map(json.loads, lines(tmp_path))] == [(1, 1), (2, 5)]
    with path.open("a") as file:
        file.write('{"step": 3, "spl')
    assert records.read_metrics(tmp_path)["train"]["loss"][0].tolist() == [1, 2], "the last line is being written"
    path.write_text('{"step": 1, "split"\n' + path.read_text())
    with pytest.raises(UserError, match=r"metrics.jsonl has a damaged line, '\{\"step\": 1, \"split\"\\n'"):
        logs.MetricLog(tmp_path, start_step=1)
    with pytest.raises(UserError, match="damaged line"):
        records.read_metrics(tmp_path)


def start(config, workdir, **settings):
    """launch.py on a run of these settings, in a process of its own."""
    workdir.mkdir(exist_ok=True)
    files.write_json(workdir / "config.json", json.loads(config.to_json()))
    command = [sys.executable, str(ROOT / "launch.py"), f"--config={ROOT}/configs/run.py:{workdir}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **settings)


def wait_for(process, condition):
    deadline = time.monotonic() + 240
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[1][-2000:])
        time.sleep(0.01)


def test_stopped_killed_and_started_again_a_run_ends_the_same(whole, rooms, tmp_path):
    """By launch.py: SIGTERM, which is exit code 75, then kill -9 at a random moment, then to the end."""
    config, workdir = depth(rooms), tmp_path / "run"
    process = start(config, workdir)
    wait_for(process, (workdir / "checkpoints" / "latest" / "1").exists)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and said.splitlines()[-1].startswith("stopped at step "), said
    stopped_at = int(newest(workdir).name)
    assert 1 <= stopped_at < 6
    process = start(config, workdir)
    wait_for(process, lambda: int(newest(workdir).name) > stopped_at)
    time.sleep(random.Random(0).uniform(0, 0.3))
    process.kill()
    process.communicate()
    assert int(newest(workdir).name) <= 6 and not (workdir / "results.json").exists()
    train.train(config, workdir)
    assert_ends_as(whole, workdir)


@pytest.mark.slow
def test_twenty_kills_of_a_demo_run_change_no_bit(tmp_path):
    """README's demo, killed by kill -9 twenty times, at random moments of its training and of its saves."""
    from configs import demo

    config = demo.get_config()
    config.run.update(checkpoint_every_steps=5, summary_rounds=0)
    assert start(config, tmp_path / "whole").wait() == 0
    random_, workdir, kills, in_a_save = random.Random(0), tmp_path / "run", 0, 0
    while kills < 20:
        process, begun = start(config, workdir), len(lines(workdir)) if (workdir / "metrics.jsonl").exists() else 0
        wait_for(process, lambda begun=begun: (workdir / "metrics.jsonl").exists() and len(lines(workdir)) > begun)
        if kills % 2:
            time.sleep(random_.uniform(0, 6))
        else:
            wait_for(process, lambda: any("tmp" in path.name for path in workdir.glob("checkpoints/latest/*")))
        process.kill()
        process.communicate()
        kills += 1
        in_a_save += any("tmp" in path.name for path in workdir.glob("checkpoints/*/*"))
        assert not (workdir / "results.json").exists(), "it should still be running"
    print(f"{kills} kills, {in_a_save} of them during a save, the last at step {state(workdir)[0]}")
    assert in_a_save > 0
    assert start(config, workdir).wait() == 0
    assert_ends_as(tmp_path / "whole", workdir)
    assert (workdir / "results.json").read_text() == (tmp_path / "whole" / "results.json").read_text()


@pytest.mark.slow
def test_a_run_with_a_target_and_a_last_phase_goes_on_the_same(rooms, tmp_path, monkeypatch):
    """The controller is part of the checkpoint: stopped at any step, lambda goes on as it would have."""
    config = depth(rooms)
    config.train.epochs = 4
    config.sparsity.update(target=0.5, target_ramp=0.3, lambda_=1e-3, warmup_steps=2, debias_at=0.75)
    config.sparsity.target_freeze = 0.7
    config.run.log_every_steps = 1
    expected = train.train(config, tmp_path / "whole")
    make_train_step = step_lib.make_train_step

    def stop_at_four(run):
        step_fn, taken = make_train_step(run), []

        def step(*arguments):
            if len(taken) == 4:
                raise KeyboardInterrupt
            taken.append(1)
            return step_fn(*arguments)

        return step

    monkeypatch.setattr(train, "make_train_step", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "stopped")
    monkeypatch.setattr(train, "make_train_step", make_train_step)
    assert train.train(config, tmp_path / "stopped") == expected
    assert_ends_as(tmp_path / "whole", tmp_path / "stopped")
    lambdas = [row["lambda"] for row in map(json.loads, lines(tmp_path / "whole")) if row["split"] == "train"]
    assert lambdas[0] == 0 and len(set(lambdas[1:6])) > 3, "warm-up, then the controller moves it"
    assert lambdas[6:] == [0, 0], "no penalty in the last phase"
    assert expected["sparsity"]["target"] == 0.5


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
def test_on_a_real_disk_that_is_full_or_read_only(whole, rooms, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)

    def ends_with(code, sentence):
        process = start(depth(rooms), workdir)
        _, said = process.communicate(timeout=300)
        assert process.returncode == code and sentence in said, said[-2000:]

    try:
        mount("size=500k")
    except subprocess.CalledProcessError:
        pytest.skip("this machine lets nobody mount")
    try:
        workdir = disk / "run"
        ends_with(2, f"error: No space left on device: {workdir}; what was saved is kept")
        saved_at = state(workdir)[0]
        assert 0 < saved_at < 6
        mount("remount,size=50m")
        ends_with(0, "")
        assert_ends_as(whole, workdir)
        mount("remount,ro")
        process = subprocess.run(
            [sys.executable, "launch.py", f"--config=configs/run.py:{workdir}", f"--workdir={disk / 'other'}"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert process.returncode == 2 and "error: Read-only file system: " in process.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)
