"""Interrupted runs resume from the last checkpoint; the result is identical to an uninterrupted run.

The reference is `whole`, an uninterrupted run; the others must end with its metrics.jsonl and its parameters, bit for
bit. docs/reliability.md has the table of faults.
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
from mtl_sparse.report import records, run_page
from mtl_sparse.runtime import files
from mtl_sparse.runtime.errors import Stopped, as_os_error
from mtl_sparse.training import checkpoints, evaluation, loop, metric_log, results
from mtl_sparse.training import folder as folder_lib
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import step as step_lib
from tests import own_backbone
from tests.conftest import raises, tiny

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = [sys.executable, str(ROOT / "launch.py"), f"--register={ROOT}/tests/register_backbones.py"]


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
    """Compile the step and the evaluation once for all runs of this file, and skip what follows the training."""
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


_hook = {}  # step -> fault that occurs while that step is computed


def _call_hook(step, state, batch):
    out = step(state, batch)
    _hook.pop(int(out[0].step), lambda: None)()
    return out


@pytest.fixture
def faults():
    """Yield a dictionary, step -> function that is called once, when that step has been computed."""
    _hook.clear()
    yield _hook
    _hook.clear()


def depth(rooms):
    """Return the config of six steps in three epochs of one task, on a backbone of one convolution."""
    config = tiny(rooms)
    config.tasks = ("depth",)
    config.model.update(backbone="own", attach=("stem",))
    config.train.epochs = 3
    config.run.log_every_steps = 3
    return config


@pytest.fixture(scope="module", autouse=True)
def registered():
    with own_backbone.registered():
        yield


@pytest.fixture(scope="module")
def whole(rooms, tmp_path_factory):
    """Return the folder of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    run = setup_lib.setup(depth(rooms))
    folder_lib.claim(workdir, run.config, run.data)
    saved = checkpoints.Checkpoints(workdir)
    loop.fit(run, evaluation.Evaluator(run), workdir, saved)
    saved.close()
    return workdir


@pytest.fixture(autouse=True)
def undrawn_unless_read(request):
    """Skip the plots and the page of a run, except in tests that read the page."""
    if "drawn" not in request.fixturenames:
        request.getfixturevalue("undrawn")


@pytest.fixture
def drawn():
    """Mark a test that reads a page."""


def assert_ends_as(whole, workdir):
    assert lines(workdir) == lines(whole)
    for kind in checkpoints.KINDS:
        assert state(workdir, kind) == state(whole, kind)


def raises_now(error):
    def fault():
        raise error

    return fault


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 100])
def test_a_signal_saves_the_step_and_the_run_resumes(whole, rooms, tmp_path, faults, every, drawn):
    """Also between two lines of the log and two checkpoints, and more than once."""
    config = depth(rooms)
    config.run.update(checkpoint_every_steps=every)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for step, number in ((1, signal.SIGTERM), (4, signal.SIGINT), (5, signal.SIGTERM)):
        faults[step] = functools.partial(os.kill, os.getpid(), number)
        with pytest.raises(Stopped, match=f"step {step} of 6"):
            train.train(config, tmp_path)
        assert state(tmp_path)[0] == step
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    with raises("RUN_NOT_FINISHED", naming=f"{tmp_path} is at step 5 of 6"):
        evaluate.run_job(config, tmp_path)
    assert not (tmp_path / "results.json").exists(), "which would make it count as finished"
    assert "Not finished." in run_page.path(tmp_path).read_text(), "and no longer: training"
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


def test_what_the_loop_remembers_is_resumed(rooms, tmp_path, faults, monkeypatch):
    scores = iter((1.0, 2.0, 3.0))
    monkeypatch.setattr(loop, "validation_score", lambda *_: next(scores))
    faults[3] = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        train.train(depth(rooms), tmp_path)
    train.train(depth(rooms), tmp_path)
    progress = state(tmp_path)[2]
    assert (progress["best"], progress["stale_epochs"], state(tmp_path, "best")[0]) == (1.0, 2, 2)


def test_a_second_ctrl_c_ends_at_once(rooms, tmp_path, faults):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    faults[3] = twice
    with pytest.raises(KeyboardInterrupt):
        train.train(depth(rooms), tmp_path)
    assert state(tmp_path)[0] == 2


def test_a_run_that_breaks_anywhere_resumes(whole, rooms, tmp_path, faults):
    """Also between the two saves of a step: the best checkpoint is of step 2, the latest still of step 1."""
    for step in (1, 3, 6):
        faults[step] = raises_now(RuntimeError(f"step {step}"))
        with pytest.raises(RuntimeError, match=f"step {step}"):
            train.train(depth(rooms), tmp_path)
        if step == 3:
            shutil.rmtree(tmp_path / "checkpoints" / "latest" / "2")
            assert (state(tmp_path)[0], state(tmp_path, "best")[0]) == (1, 2)
    train.train(depth(rooms), tmp_path)
    assert_ends_as(whole, tmp_path)


def flip(path):
    data = bytearray(path.read_bytes())
    for place in range(0, len(data), 64):  # a single one may be in bytes that are not read
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
def test_of_a_damaged_checkpoint_the_one_before_is_taken(whole, rooms, tmp_path, faults, caplog, damage):
    faults[4] = raises_now(RuntimeError)
    with pytest.raises(RuntimeError):
        train.train(depth(rooms), tmp_path)
    assert newest(tmp_path).name == "3"
    DAMAGE[damage](newest(tmp_path))
    train.train(depth(rooms), tmp_path)
    assert "checkpoints/latest/3 is damaged" in caplog.text
    assert [path.name for path in (tmp_path / "checkpoints" / "damaged").iterdir()] == ["latest_3"]
    assert_ends_as(whole, tmp_path)


def test_where_no_checkpoint_is_whole_nothing_is_removed(whole, rooms, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = lines(tmp_path)
    for folder in (tmp_path / "checkpoints" / "latest").iterdir():
        flip(largest(folder))
    for _ in range(2):
        with raises("CHECKPOINT_DAMAGED", naming="latest/6 and ") as caught:
            train.train(depth(rooms), tmp_path)
        assert str(tmp_path / "checkpoints" / "latest" / "5") in str(caught.value)
        assert lines(tmp_path) == before and not (tmp_path / "checkpoints" / "damaged").exists()
    flip(largest(tmp_path / "checkpoints" / "best"))
    (best,) = (tmp_path / "checkpoints" / "best").iterdir()
    with raises("CHECKPOINT_DAMAGED", naming=str(best)):
        state(tmp_path, "best")
    assert len(list((tmp_path / "checkpoints" / "best").iterdir())) == 1


def test_a_second_process_on_a_folder_is_refused(whole, rooms, tmp_path, faults):
    def another():
        with raises("FOLDER_IN_USE", naming=str(tmp_path)):
            train.train(depth(rooms), tmp_path)
        with raises("FOLDER_IN_USE", naming=str(tmp_path)):
            evaluate.run_job(depth(rooms), tmp_path)

    faults[2] = another
    train.train(depth(rooms), tmp_path)
    assert not faults
    assert_ends_as(whole, tmp_path)


def not_finite_at(monkeypatch, *steps):
    batches = setup_lib.Batches.train

    def broken(self, start_step):
        for step, batch in enumerate(batches(self, start_step), start_step + 1):
            yield {**batch, "image": batch["image"] * np.float32(np.nan)} if step in steps else batch

    monkeypatch.setattr(setup_lib.Batches, "train", broken)


def test_a_step_that_is_not_finite_stops_with_the_step_named(rooms, tmp_path, monkeypatch):
    not_finite_at(monkeypatch, 3)
    with raises("STEP_NOT_FINITE", naming="step 3 (") as caught:
        train.train(depth(rooms), tmp_path)
    assert all(part in str(caught.value) for part in ("grad_norm=nan", "step 2", "run.skip_not_finite"))
    assert state(tmp_path)[0] == 2
    assert max(json.loads(line)["step"] for line in lines(tmp_path)) == 2


def test_steps_that_are_not_finite_are_skipped_and_counted(whole, rooms, tmp_path, monkeypatch, faults):
    """Two in a row after a checkpoint, one later: parameters, optimizer and statistics stay what they were."""
    config = depth(rooms)
    config.run.skip_not_finite = 2
    config.run.checkpoint_every_steps = 2
    not_finite_at(monkeypatch, 3, 4, 6)
    faults[4] = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
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
    with raises("STEP_NOT_FINITE", naming="step 4 (2 steps") as caught:
        train.train(config, tmp_path / "again")
    assert "step 2" in str(caught.value)


def _read(workdir, step):
    saved = checkpoints.Checkpoints(workdir)
    leaves, progress = saved._leaves("latest", step)
    saved.close()
    return step, {name: leaf.tobytes() for name, leaf in leaves.items()}, progress


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(whole, rooms, tmp_path, monkeypatch):
    draw, real = random.Random(0), time.time

    def jumping():
        return real() + draw.choice((-1, 0, 1)) * 86400

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    train.train(depth(rooms), tmp_path)
    assert_ends_as(whole, tmp_path)


def test_a_disk_that_is_full_loses_nothing(whole, rooms, tmp_path, faults):
    """Simulated by a limit on the size of a file, which the checkpoints from step 3 on exceed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    faults[3] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as raised, as_os_error(tmp_path):
            train.train(depth(rooms), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.filename
    assert state(tmp_path)[0] in (1, 2), "that of step 2 may have been under way"
    train.train(depth(rooms), tmp_path)
    assert_ends_as(whole, tmp_path)


def test_a_folder_that_becomes_read_only_loses_nothing(whole, rooms, tmp_path, faults):
    """Root can write to every folder, so as root the test changes the user, too."""
    folders = [tmp_path / "checkpoints" / kind for kind in checkpoints.KINDS]

    def lock():
        for folder in folders:
            folder.chmod(0o555)
        if os.getuid() == 0:
            os.seteuid(65534)

    faults[3] = lock
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


def test_steps_that_are_run_again_are_not_logged_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "split": "train", "loss": 1}\n{"step": 2, "split": "train", "loss": 2}\n{"step": 3, "spl'
    )
    log = metric_log.MetricLog(tmp_path, start_step=1)
    log.write(2, "train", {"loss": 5})
    log.close()
    assert [(row["step"], row["loss"]) for row in map(json.loads, lines(tmp_path))] == [(1, 1), (2, 5)]
    with path.open("a") as file:
        file.write('{"step": 3, "spl')
    assert records.read_metrics(tmp_path)["train"]["loss"][0].tolist() == [1, 2], "the last line is being written"
    path.write_text('{"step": 1, "split"\n' + path.read_text())
    for read in (lambda: metric_log.MetricLog(tmp_path, start_step=1), lambda: records.read_metrics(tmp_path)):
        with raises("FILE_DAMAGED", naming=str(path)) as caught:
            read()
        assert """'{"step": 1, "split"\\n'""" in str(caught.value)
    path.write_text('{"split": "train"}\n')
    with raises("FILE_DAMAGED", naming='{"split": "train"}'):
        metric_log.MetricLog(tmp_path, start_step=1)


def start(config, workdir, **options):
    """Start launch.py on a run of this config, in a new process."""
    workdir.mkdir(exist_ok=True)
    files.write_json(workdir / "config.json", json.loads(config.to_json()))
    command = [*LAUNCH, f"--config={ROOT}/configs/run.py:{workdir}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)


def wait_for(process, condition):
    deadline = time.monotonic() + 240
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[1][-2000:])
        time.sleep(0.01)


def test_stopped_killed_and_started_again_a_run_ends_the_same(whole, rooms, tmp_path):
    """With launch.py: SIGTERM, which gives exit code 75, then kill -9 at a random moment, then to the end."""
    config, workdir = depth(rooms), tmp_path / "run"
    process = start(config, workdir)
    wait_for(process, (workdir / "checkpoints" / "latest" / "1").exists)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err.splitlines()[-1].startswith("stopped at step "), err
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
    """The demo, killed by kill -9 twenty times, at random moments of its training and of its saves."""
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
def test_a_run_with_a_target_and_a_debiasing_phase_resumes_the_same(rooms, tmp_path, monkeypatch):
    """The controller is part of the checkpoint: after a stop at any step, lambda continues as without it."""
    config = depth(rooms)
    config.train.epochs = 4
    config.sparsity.update(target=0.5, target_ramp=0.3, lambda_=1e-3, warmup_steps=2, debias_at=0.75)
    config.sparsity.target_freeze = 0.7
    config.run.log_every_steps = 1
    expected = train.train(config, tmp_path / "whole")
    make_train_step = loop.make_train_step

    def stop_at_four(run):
        step_fn, taken = make_train_step(run), []

        def step(*arguments):
            if len(taken) == 4:
                raise KeyboardInterrupt
            taken.append(1)
            return step_fn(*arguments)

        return step

    monkeypatch.setattr(loop, "make_train_step", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "stopped")
    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    assert train.train(config, tmp_path / "stopped") == expected
    assert_ends_as(tmp_path / "whole", tmp_path / "stopped")
    lambdas = [row["lambda"] for row in map(json.loads, lines(tmp_path / "whole")) if row["split"] == "train"]
    assert lambdas[0] == 0 and len(set(lambdas[1:6])) > 3, "warm-up, then the controller moves it"
    assert lambdas[6:] == [0, 0], "no penalty in the debiasing phase"
    assert expected["sparsity"]["target"] == 0.5


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
def test_on_a_real_disk_that_is_full_or_read_only(whole, rooms, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)

    def ends_with(code, message):
        process = start(depth(rooms), workdir)
        _, err = process.communicate(timeout=300)
        assert process.returncode == code and message in err, err[-2000:]

    try:
        mount("size=500k")
    except subprocess.CalledProcessError:
        pytest.skip("mounting is not allowed here")
    try:
        workdir = disk / "run"
        ends_with(2, f"error: No space left on device: {workdir}")
        saved_at = state(workdir)[0]
        assert 0 < saved_at < 6
        mount("remount,size=50m")
        ends_with(0, "")
        assert_ends_as(whole, workdir)
        mount("remount,ro")
        process = subprocess.run(
            [*LAUNCH, f"--config={ROOT}/configs/run.py:{workdir}", f"--workdir={disk / 'other'}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert process.returncode == 2 and "error: Read-only file system: " in process.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)
