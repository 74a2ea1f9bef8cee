import contextlib
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import submitit

from configs import sweeps
from mtl_sparse.jobs import benchmark, cli, sweep
from mtl_sparse.report import records, schema, study
from mtl_sparse.report.schema import Timing, TimingRow
from mtl_sparse.runtime import files, logs, progress
from mtl_sparse.runtime.errors import Stopped
from mtl_sparse.training import config as config_lib
from tests.conftest import raises, tiny
from tests.report.study_test import write_run

LAMBDAS = [{"sparsity.lambda_": value, "seed": seed} for value in (0.0, 1e-4) for seed in (0, 1)]
NAMES = ["lambda_=0.0__seed=0", "lambda_=0.0__seed=1", "lambda_=0.0001__seed=0", "lambda_=0.0001__seed=1"]


@pytest.fixture
def trained(monkeypatch):
    """Return the trials that were run; instead of training, write results.json, or failed.txt for those in `fails`."""
    names, fails = [], set()
    lock = threading.Lock()

    def run_trial(folder, register=""):
        folder = pathlib.Path(folder)
        with lock:
            names.append(folder.name)
        if folder.name in fails:
            (folder / "failed.txt").write_text("exit code 2: training is not finite\n")
            return False
        (folder / "results.json").write_text("{}")
        return True

    monkeypatch.setattr(sweep, "run_trial", run_trial)
    run_trial.names, run_trial.fails = names, fails
    return run_trial


@pytest.fixture
def no_weights(tmp_path_factory):
    """Return a file that is not one of weights: a run that starts from it fails early."""
    path = tmp_path_factory.mktemp("files") / "notes.txt"
    path.write_text("no weights\n")
    return str(path)


def run(config, folder, settings=LAMBDAS, **options):
    return sweep.run_job(config, folder, settings, sweep.Options(**options))


def test_every_trial_is_a_run_folder_with_its_settings(config, tmp_path, trained):
    assert run(config, tmp_path, max_parallel=2) == NAMES
    assert sorted(trained.names) == sorted(NAMES)
    for name, settings in zip(NAMES, LAMBDAS, strict=True):
        stored = json.loads((tmp_path / name / "config.json").read_text())
        assert stored["sparsity"]["lambda_"] == settings["sparsity.lambda_"] and stored["seed"] == settings["seed"]
        assert stored["data"]["folder"] == config.data.folder


def test_weights_that_do_not_exist_are_named_before_any_run(config, tmp_path, trained):
    config.model.init_from = "LITE0"
    with raises("FILE_MISSING", naming="model.init_from='LITE0'"):
        run(config, tmp_path / "sweep")
    assert not trained.names and not (tmp_path / "sweep").exists()


def test_the_folder_of_a_sweep_has_its_log(config, tmp_path, trained, monkeypatch):
    """Of all its runs, and with the error at the end."""
    found = []

    @contextlib.contextmanager
    def to_file(path):
        before = list(trained.names)
        with pytest.raises(sweep.RunsFailed) as caught:
            yield
        found.append((path, before, list(trained.names)))
        raise caught.value

    monkeypatch.setattr(logs, "to_file", to_file)
    trained.fails.add(NAMES[1])
    with raises("SWEEP_RUNS_FAILED", naming=NAMES[1]):
        run(config, tmp_path)
    assert found == [(tmp_path / "log.txt", [], NAMES)]


def test_a_terminal_shows_the_runs_that_are_done(config, tmp_path, trained, monkeypatch, caplog):
    shown, rows = [], {}
    display = mock.Mock(begin=shown.append, end=lambda phase: rows.update({phase.name: (phase.numbers, phase.rows)}))
    monkeypatch.setattr(progress, "_displays", [display])
    trained.fails.add(NAMES[1])
    with raises("SWEEP_RUNS_FAILED", naming=NAMES[1]), caplog.at_level("INFO", logger="absl"):
        run(config, tmp_path)
    assert [phase.name for phase in shown][-1] == "sweep"
    numbers, below = rows["sweep"]
    assert numbers.startswith("4/4 runs, ") and numbers.endswith(" left") and below == {"failed": "1"}
    lines = [record for record in caplog.records if "/4 runs" in record.getMessage()]
    assert [record.levelname for record in lines].count("WARNING") == 1 and len(lines) == 4, "a failure stands out"


def test_finished_runs_are_skipped(config, tmp_path, trained):
    run(config, tmp_path)
    trained.names.clear()
    (tmp_path / NAMES[2] / "results.json").unlink()
    assert run(config, tmp_path) == NAMES
    assert trained.names == [NAMES[2]]


def test_failed_runs_are_named_and_run_again_on_request(config, tmp_path, trained):
    trained.fails.add(NAMES[1])
    with raises("SWEEP_RUNS_FAILED", naming=NAMES[1]) as caught:
        run(config, tmp_path)
    message = str(caught.value)
    assert "not finite" in message and "--retry_failed" in message and "1 of 4 runs" in message
    assert not any(name in message for name in (NAMES[0], *NAMES[2:]))
    assert len(trained.names) == 4, "the others are run all the same"
    with raises("SWEEP_RUNS_FAILED", naming=NAMES[1]):
        run(config, tmp_path)
    assert len(trained.names) == 4
    trained.fails.clear()
    assert run(config, tmp_path, retry_failed=True) == NAMES
    assert trained.names[4:] == [NAMES[1]]


def test_shards_divide_the_trials(config, tmp_path, trained):
    parts = [run(config, tmp_path, shard=(i, 3)) for i in range(3)]
    assert parts == [[NAMES[0], NAMES[3]], [NAMES[1]], [NAMES[2]]]
    assert sorted(trained.names) == sorted(NAMES)


def test_shards_that_start_at_once_do_not_conflict(tmp_path):
    """Each process writes the sweep's list at its own time."""
    value = {"trials": list(range(20_000))}
    script = "import pathlib, sys; from mtl_sparse.runtime import files; "
    script += "[files.write_json(pathlib.Path(sys.argv[1]), {'trials': list(range(20_000))}) for _ in range(100)]"
    command = [sys.executable, "-c", script, str(tmp_path / "sweep.json")]
    writers = [subprocess.Popen(command, cwd=pathlib.Path(sweep.__file__).parents[2]) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "sweep.json").exists():
            assert json.loads((tmp_path / "sweep.json").read_text()) == value
    assert [writer.returncode for writer in writers] == [0, 0] and len(list(tmp_path.iterdir())) == 1


def test_a_later_trials_attachment_points_are_checked_before_any_run(config, tmp_path, trained):
    settings = [{"model.attach": points} for points in ((), ("layer9",) * 3)]
    with raises("OPTION_UNKNOWN_VALUE", naming="'layer9'"):
        run(config, tmp_path / "sweep", settings)
    assert not trained.names


def written_before(folder, trials):
    """Write sweep.json of an earlier version, which separated options by commas; return the trials' names."""
    names = [",".join(f"{path.rpartition('.')[2]}={value}" for path, value in one.items()) for one in trials]
    (folder / "sweep.json").write_text(json.dumps({"trials": dict(zip(names, trials, strict=True))}))
    return names


def test_a_sweep_of_an_earlier_version_is_resumed_by_its_names(config, tmp_path, trained):
    """The finished run is kept; the others run in the folders that sweep.json lists, which does not change."""
    names = written_before(tmp_path, LAMBDAS)
    before = (tmp_path / "sweep.json").read_text()
    assert names[0] == "lambda_=0.0,seed=0"
    (tmp_path / names[0]).mkdir()
    one = config.copy_and_resolve_references()
    one.sparsity.lambda_, one.seed = 0.0, 0
    (tmp_path / names[0] / "config.json").write_text(one.to_json())
    (tmp_path / names[0] / "results.json").write_text("{}")
    assert run(config, tmp_path) == names
    assert trained.names == names[1:] and (tmp_path / "sweep.json").read_text() == before
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(names)
    trained.names.clear()
    assert run(config, tmp_path, LAMBDAS[::-1]) == names[::-1] and not trained.names, "in whatever order"
    with raises("SWEEP_DIFFERS", naming=str(tmp_path)):
        run(config, tmp_path, LAMBDAS[:3])


def test_a_sweep_of_an_earlier_version_is_reported(tmp_path):
    trials = [{"sparsity.lambda_": 1e-5, "seed": seed} for seed in (0, 1)]
    for name in written_before(tmp_path, trials)[:1]:
        write_run(tmp_path / name, ("depth",), 1e-5, 0, mae=0.1)
    found = study.read([tmp_path])
    assert [folder.name for folder in found.rows[0].folders.values()] == ["lambda_=1e-05,seed=0"]
    assert found.unfinished == ("lambda_=1e-05,seed=1",)


def test_folders_with_commas_are_found_in_a_list_with_commas(tmp_path):
    names = [tmp_path / name for name in ("lambda_=0.0,seed=0", "b", "lambda_=0.0__seed=1", "tasks=depth,a=1,b=2")]
    for folder in names:
        folder.mkdir()
    missing = str(tmp_path / "missing")
    given = ",".join(map(str, [*names, missing]))
    assert cli.existing_folders(given.split(",")) == [*map(str, names), missing]


def test_the_list_of_a_later_version_is_refused(config, tmp_path, trained):
    (tmp_path / "sweep.json").write_text(json.dumps({"version": 99, "trials": {}}))
    with raises("SCHEMA_TOO_NEW", naming=str(tmp_path / "sweep.json")):
        run(config, tmp_path)
    assert not trained.names


def test_names_of_trials_need_no_quotes_and_have_no_commas(config):
    settings = [{"tasks": ("depth", "edge"), "data.folder": "/a,b/c", "seed": 0}]
    (trial,) = sweep.make_trials(config, settings)
    assert trial.name == "tasks=depth+edge__folder=_a+b_c__seed=0"


def test_the_same_trial_in_another_order_is_refused(config):
    with raises("SWEEP_TRIAL_TWICE", naming="epochs=2"):
        sweep.make_trials(config, [{"seed": 0, "train.epochs": 2}, {"train.epochs": 2, "seed": 0}])


def test_a_folder_of_another_sweep_is_refused(config, tmp_path, trained):
    run(config, tmp_path)
    with raises("SWEEP_DIFFERS", naming=str(tmp_path)):
        run(config, tmp_path, LAMBDAS[:2])
    config.model.width = 8
    with raises("RUN_DIFFERS", naming="model.width=4 there, 8 now"):
        run(config, tmp_path)


@pytest.mark.slow
def test_a_trial_is_trained_in_a_process_of_its_own(rooms, no_weights, tmp_path):
    config = tiny(rooms)
    config.train.epochs, config.tasks = 1, ("depth",)
    with raises("SWEEP_RUNS_FAILED", naming="notes.txt (exit code 2: expected"):
        run(config, tmp_path, [{"model.init_from": source} for source in ("", no_weights)], max_parallel=2)
    done = tmp_path / "init_from="
    assert json.loads((done / "results.json").read_text())["config"]["tasks"] == ["depth"]
    assert (done / "plots" / "samples.png").exists() and "first step compiles" in (done / "log.txt").read_text()


@pytest.mark.slow
def test_a_cluster_runs_the_trials_through_submitit(config, no_weights, tmp_path):
    """submitit's local executor takes the same path as its SLURM executor; the trial fails early and is reported."""
    with raises("SWEEP_RUNS_FAILED", naming="notes.txt (exit code 2: expected"):
        run(config, tmp_path, [{"model.init_from": no_weights}], cluster="local", cluster_settings={"timeout_min": 5})
    assert list((tmp_path / "submitit").glob("*_submitted.pkl")) and list(tmp_path.glob("init_from=*/log.txt"))


def test_a_cluster_continues_without_a_job_that_was_lost(config, tmp_path, monkeypatch):
    """And runs at most max_parallel jobs at a time."""
    at_once, most, lock = 0, 0, threading.Lock()

    class Executor:
        def __init__(self, **_):
            pass

        def update_parameters(self, **_):
            pass

        def submit(self, function, folder, register):
            nonlocal at_once, most
            with lock:
                at_once += 1
                most = max(most, at_once)
            return mock.Mock(result=functools.partial(self.result, folder))

        def result(self, folder):
            nonlocal at_once
            time.sleep(0.05)
            with lock:
                at_once -= 1
            if folder.endswith(NAMES[1]):
                raise submitit.core.utils.UncompletedJobError("Job 7 not completed:\n time limit")
            (pathlib.Path(folder) / "results.json").write_text("{}")
            return True

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    lost = f"{NAMES[1]} (its job on the cluster was lost: Job 7 not completed: time limit)"
    with raises("SWEEP_RUNS_FAILED", naming=lost):
        run(config, tmp_path, cluster="local", max_parallel=2)
    assert most == 2 and sum((tmp_path / name / "results.json").exists() for name in NAMES) == 3


def test_a_users_own_config_file_is_handed_to_the_runs(config, tmp_path, monkeypatch):
    commands = []
    process = lambda command, **_: commands.append(command) or mock.Mock(wait=lambda: 0)  # noqa: E731
    monkeypatch.setattr(sweep.subprocess, "Popen", process)
    run(config, tmp_path, LAMBDAS[:1], register="discs.py")
    run(config, tmp_path, LAMBDAS[:1])
    assert ["--register=discs.py" in command for command in commands] == [True, False]


def test_long_names_of_trials_fit_and_differ(config):
    names = [f"attribute:{'x' * 20}{i}" for i in range(40)]
    settings = [{"tasks": tuple(names), "seed": seed} for seed in (0, 1)]
    one, two = (trial.name for trial in sweep.make_trials(config, settings))
    assert one != two and max(len(name.encode()) for name in (one, two)) < 256
    assert one == sweep.make_trials(config, settings)[0].name


def test_a_file_system_without_locks_runs_all_the_same(config, tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda *_, **__: mock.Mock(wait=lambda: 0))
    with caplog.at_level("WARNING"):
        run(config, tmp_path, LAMBDAS[:1])
    assert "cannot be locked" in caplog.text


def test_a_run_that_is_stopped_has_not_failed(config, tmp_path, monkeypatch):
    codes = iter([75, -signal.SIGTERM, -signal.SIGKILL, 0])

    def process(command, **_):
        return mock.Mock(wait=lambda: next(codes))

    monkeypatch.setattr(sweep.subprocess, "Popen", process)
    for _ in range(2):
        with pytest.raises(Stopped, match=NAMES[0]):
            run(config, tmp_path, LAMBDAS[:1])
        assert not (tmp_path / NAMES[0] / "failed.txt").exists()
    with raises("SWEEP_RUNS_FAILED", naming=f"{NAMES[0]} (exit code -9"):
        run(config, tmp_path, LAMBDAS[:1])
    assert run(config, tmp_path, LAMBDAS[:1], retry_failed=True) == NAMES[:1]


def test_a_sweep_that_is_stopped_stops_its_runs(config, tmp_path, monkeypatch):
    """The processes of this test print a word when they are asked to stop, and exit like a run that saved."""
    script = f"import signal, sys, time; signal.signal({signal.SIGTERM:d}, lambda *_: (print('saved'), sys.exit(75)))\n"
    script += "print('training', flush=True); time.sleep(60)"
    start = subprocess.Popen
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda _, **given: start([sys.executable, "-c", script], **given))
    logs = [tmp_path / name / "log.txt" for name in NAMES]

    def stop():
        while [log.exists() and log.read_text() for log in logs[:2]] != ["training\n"] * 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped, match="the sweep was stopped"):
        run(config, tmp_path, max_parallel=2)
    thread.join()
    assert [log.exists() and log.read_text() for log in logs] == ["training\nsaved\n"] * 2 + [False] * 2
    assert signal.getsignal(signal.SIGTERM) == handler and not list(tmp_path.glob("*/failed.txt"))


def test_an_unknown_cluster_is_named(config, tmp_path, trained):
    with raises("OPTION_UNKNOWN_VALUE", naming="--cluster='pbs'"):
        run(config, tmp_path, cluster="pbs")
    with raises("OPTION_UNKNOWN_VALUE", naming="--cluster_settings={'colour': 'red'}"):
        run(config, tmp_path, cluster="local", cluster_settings={"colour": "red"})


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_table_of_an_uninterrupted_one(rooms, tmp_path):
    root = pathlib.Path(sweep.__file__).parents[2]
    settings = [
        "data.embedded.frames=0",
        f"data.folder={rooms}",
        "data.size=(32,48)",
        "model.width=4",
        "sparsity.target=0",
    ]
    settings += ["model.head_features=4", "train.batch_size=8", "train.epochs=3", "run.checkpoint_every_steps=1"]
    command = [sys.executable, str(root / "launch.py"), f"--config={root}/configs/demo.py", "--job=sweep"]
    command += ["--grid=seed=0,1", *(f"--config.{setting}" for setting in settings)]

    def start(workdir):
        log = (tmp_path / "log.txt").open("a")
        return subprocess.Popen([*command, f"--workdir={workdir}"], stdout=log, stderr=log, start_new_session=True)

    killed = start(tmp_path / "killed")
    second = tmp_path / "killed" / "seed=1" / "metrics.jsonl"
    while not (second.exists() and second.read_text().count('"validation"') >= 1):
        assert killed.poll() is None, (tmp_path / "log.txt").read_text()[-2000:]
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)  # the sweep and the run that it was at
    killed.wait()
    assert (tmp_path / "killed" / "seed=0" / "results.json").exists()
    assert not (tmp_path / "killed" / "seed=1" / "results.json").exists()
    assert start(tmp_path / "killed").wait() == 0
    assert "Resuming from step" in (tmp_path / "killed" / "seed=1" / "log.txt").read_text()
    assert start(tmp_path / "whole").wait() == 0
    ours, theirs = ((tmp_path / name / "report" / "summary.csv").read_text() for name in ("killed", "whole"))
    assert ours == theirs and ours.count("\n") == 2


def test_grids_are_every_combination():
    assert sweep.parse_grid("sparsity.lambda_=0.0,1e-5; seed=0,1") == [
        {"sparsity.lambda_": 0.0, "seed": 0},
        {"sparsity.lambda_": 0.0, "seed": 1},
        {"sparsity.lambda_": 1e-5, "seed": 0},
        {"sparsity.lambda_": 1e-5, "seed": 1},
    ]
    assert sweep.parse_grid("sparsity.penalty=l1,group_mcp") == [
        {"sparsity.penalty": "l1"},
        {"sparsity.penalty": "group_mcp"},
    ]
    assert sweep.parse_grid("tasks=('depth',),('depth','edge')") == [
        {"tasks": ("depth",)},
        {"tasks": ("depth", "edge")},
    ]
    assert sweep.parse_settings("timeout_min=600,slurm_partition=gpu") == {"timeout_min": 600, "slurm_partition": "gpu"}


BAD = {
    "": ("SWEEP_GRID", "--grid"),
    "seed": ("SWEEP_GRID", "'seed'"),
    "seed=0; seed=1": ("SWEEP_GRID", "'seed=1'"),
    "sparsity.lamda=0": ("OPTION_UNKNOWN", "config.sparsity.lambda_"),
    "seed=one": ("OPTION_TYPE", "config.seed='one'"),
    "seed=0,0": ("SWEEP_TRIAL_TWICE", "seed=0"),
    "sparsity.lambda_=-1.0": ("OPTION_SPARSITY", "lambda_"),
    "tasks=albedo": ("TASK_UNKNOWN", "'albedo'"),
}


@pytest.mark.parametrize("grid", BAD)
def test_bad_grids_are_named_before_anything_is_written(config, tmp_path, trained, grid):
    code, naming = BAD[grid]
    with raises(code, naming=naming):
        run(config, tmp_path / "sweep", sweep.parse_grid(grid))
    assert not (tmp_path / "sweep").exists()


def test_bad_options_are_named(config, tmp_path):
    for shard in ("3/3", "1", "-1/2", "a/b"):
        with raises("OPTION_OUT_OF_RANGE", naming=f"--shard={shard!r}"):
            sweep.parse_shard(shard)
    assert sweep.parse_shard("2/3") == (2, 3)
    with raises("OPTION_OUT_OF_RANGE", naming="--max_parallel=0"):
        run(config, tmp_path, max_parallel=0)
    with raises("OPTION_TYPE", naming="'gpu'"):
        sweep.parse_settings("gpu")


COUNTS = {
    "table1": 7 * 3,
    "table2": 6 * 2,
    "table3": 3,
    "lambda_path": 7,
    "lomt": 1,
    "target_path": 6,
    "fair_baseline": 7,
    "fidelity": 14,
    "paper_baseline": 7,
    "evidence": 15,
    "groups": 5,
    "weighting": 2 * 19 + 3,
    "baselines": 8 + 3,
    "pretrained": 6 + 3 + 9,
    "targets": 3 * 3 * 2,
}


@pytest.mark.parametrize("name", sweeps.SWEEPS)
def test_named_sweeps_have_their_runs(name):
    for size in sweeps.SWEEPS[name][1]:
        seeds = {"": 5, ":demo": 2} | {
            "lomt": {":demo": 3},
            "fidelity": {":demo": 3},
            "evidence": {"": 3, ":cpu": 3},
            "weighting": {"": 3},
            "baselines": {"": 3, ":demo": 3, ":cpu": 3},
            "groups": {"": 3, ":demo": 3, ":cpu": 3},
            "pretrained": {"": 3, ":demo": 3},
            "targets": {"": 1, ":demo": 1},
        }.get(name, {})
        trials = sweep.make_trials(sweeps.get_config(name + size), sweeps.trials(name + size))
        # Two rows of `evidence` have six seeds, three of `pretrained` five.
        more = 2 * 3 if (name == "evidence" and size != ":demo") or name == "pretrained" else 0
        assert len(trials) == COUNTS[name] * seeds[size] + more
        assert sum(trial.config.seed == 0 for trial in trials) == COUNTS[name]
        assert len({trial.config.to_json() for trial in trials}) == len(trials)
        assert max(len(trial.name) for trial in trials) < 256, "a folder's name"


TRACED = ("pretrained", "targets")  # their checks trace a model for each backbone and size


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow if x in TRACED else ()) for x in sweeps.SWEEPS]
)
def test_the_runs_of_named_sweeps_are_valid(name):
    for size in sweeps.SWEEPS[name][1]:
        for trial in sweep.make_trials(sweeps.get_config(name + size), sweeps.trials(name + size)):
            if trial.config.seed == 0:  # other seeds are alike
                config_lib.check(trial.config)


@pytest.mark.parametrize(("name", "rate", "runs"), [("pretrained", None, 9), ("pretrained_1e-3", 1e-3, 27)])
def test_the_records_of_the_pretrained_sweep_are_of_its_runs(name, rate, runs):
    config = sweeps.get_config("pretrained")
    config.optimizer.learning_rate = rate or config.optimizer.learning_rate
    trials = {
        trial.name: records.flat(json.loads(trial.config.to_json()))
        for trial in sweep.make_trials(config, sweeps.trials("pretrained"))
    }
    folder = pathlib.Path(__file__).parents[2] / "docs" / "results" / name
    found = [path for path in sorted(folder.glob("*/results.json")) if "prune=l0" not in path.parent.name]  # a control
    assert len(found) == runs
    for path in found:
        ours = trials[path.parent.name]
        theirs = records.flat(schema.migrate("config", schema.Results.read(path).config))
        differing = {name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)}
        assert not [name for name in differing if not name.startswith(records.FREE)], path


def test_the_benchmark_of_a_sweep_times_its_finished_runs_once(config, tmp_path, trained, monkeypatch):
    trained.fails.add(NAMES[1])
    with raises("SWEEP_RUNS_FAILED", naming=NAMES[1]):
        run(config, tmp_path)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    timed = []

    def run_job(own, folder):
        timed.append((folder.name, own.sparsity.lambda_, own.benchmark.rounds))
        rows = tuple(TimingRow("model", "dense", batch, *[1] * 8) for batch in own.benchmark.batch_sizes)
        options = {"rounds": own.benchmark.rounds, "compact": json.loads(own.compact.to_json())}
        timing = Timing(benchmark.device(), group_sparsity=0.5, rows=rows, **options)
        timing.write(folder / "benchmark.json")

    monkeypatch.setattr(benchmark, "run_job", run_job)
    config.benchmark.rounds = 3
    sweep.benchmark_job(config, tmp_path)
    assert timed == [(NAMES[0], 0.0, 3), (NAMES[2], 1e-4, 3), (NAMES[3], 1e-4, 3)]
    (tmp_path / NAMES[2] / "benchmark.json").unlink()
    sweep.benchmark_job(config, tmp_path)
    assert timed[3:] == [(NAMES[2], 1e-4, 3)]
    config.benchmark.batch_sizes = (2,)
    sweep.benchmark_job(config, tmp_path)
    assert len(timed) == 7, "other batch sizes are timed again"
    config.compact.multiple = 1
    sweep.benchmark_job(config, tmp_path)
    assert len(timed) == 10, "and so are other compact models"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    sweep.benchmark_job(config, tmp_path)
    assert len(timed) == 13, "and other pages of memory"


def test_unknown_sweeps_are_named():
    for name in ("", "table9", "table1:small"):
        with raises("SWEEP_UNKNOWN", naming=f"{name!r}"):
            sweeps.trials(name)
