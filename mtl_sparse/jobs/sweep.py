"""`--job=sweep`: many runs of one config with different options, each an ordinary run in a subfolder; resumable."""

import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import operator
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from mtl_sparse import tasks as tasks_lib
from mtl_sparse.compaction import rewritten
from mtl_sparse.jobs import benchmark
from mtl_sparse.report import records
from mtl_sparse.report.schema import Sweep
from mtl_sparse.runtime import files, installed, logs, progress
from mtl_sparse.runtime.errors import Stopped, UserError
from mtl_sparse.training import config as config_lib
from mtl_sparse.training import folder as folder_lib
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state

CLUSTERS = ("slurm", "local")  # of submitit
_SEPARATOR = "__"  # of the options in a trial's name
# Exit codes of a run that was asked to stop: that of launch.py, and those of a signal before launch.py handles it.
_STOPPED = (os.EX_TEMPFAIL, 128 + signal.SIGINT, -signal.SIGINT, -signal.SIGTERM)
_processes: set[subprocess.Popen] = set()  # of the sweep's runs


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
      name: name of the run's folder.
      settings: the options that the sweep sets, by dotted path, as JSON values.
      config: the run's whole config.
    """

    name: str
    settings: dict[str, Any]
    config: Any


@dataclasses.dataclass(frozen=True)
class Options:
    """How a sweep runs.

    Attributes:
      max_parallel: number of runs at a time.
      shard: (i, n) runs every n-th trial from the i-th on, i from 0: one of n jobs of an array.
      retry_failed: whether to run the trials again that failed before.
      cluster: "" for processes on this machine; "slurm", or "local" to try it, for jobs of submitit.
      cluster_settings: options of submitit's executor, such as {"slurm_partition": "gpu", "timeout_min": 600}.
      register: Python file that the processes of the runs load first, for its data sets and tasks.
    """

    max_parallel: int = 1
    shard: tuple[int, int] = (0, 1)
    retry_failed: bool = False
    cluster: str = ""
    cluster_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    register: str = ""


class RunsFailed(UserError):
    """Some runs of a sweep failed; the others have finished."""


def parse_grid(text: str) -> list[dict[str, Any]]:
    """Return the options of each combination of "sparsity.lambda_=0.0,1e-5; seed=0,1"; the last name varies fastest.

    Raises:
      UserError: SWEEP_GRID for text of another form.
    """
    choices: dict[str, tuple[Any, ...]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, values = part.partition("=")
        if not equals or not values.strip() or name.strip() in choices:
            raise UserError(
                "SWEEP_GRID", f"expected each part of --grid as NAME=VALUE,VALUE, with each name once, got {part!r}"
            )
        try:
            parsed = ast.literal_eval(f"({values},)")
        except (ValueError, SyntaxError):
            parsed = tuple(value.strip() for value in values.split(","))
        choices[name.strip()] = parsed
    if not choices:
        raise UserError(
            "SWEEP_GRID", "--job=sweep needs --config=configs/sweeps.py:NAME, or --grid='NAME=VALUE,VALUE; ...'"
        )
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def parse_shard(text: str) -> tuple[int, int]:
    """Return (i, n) for "i/n".

    Raises:
      UserError: OPTION_OUT_OF_RANGE.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError("OPTION_OUT_OF_RANGE", f"expected i/n with i from 0 to n - 1, got --shard={text!r}")
    return int(index), int(count)


def parse_settings(text: str) -> dict[str, Any]:
    """Return {"timeout_min": 600, "slurm_partition": "gpu"} for "timeout_min=600,slurm_partition=gpu".

    Raises:
      UserError: OPTION_TYPE for text of another form.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError("OPTION_TYPE", f"expected NAME=VALUE,... in --cluster_settings, got {part!r}")
        found[name] = int(value) if value.isdecimal() else value
    return found


def make_trials(config, settings: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Return a trial for each set of options, with a copy of the base config.

    Args:
      config: the base.
      settings: for each trial, options by dotted path.

    Raises:
      UserError: OPTION_UNKNOWN or OPTION_TYPE for an option or value that the config does not take, SWEEP_TRIAL_TWICE.
    """
    trials: dict[str, Trial] = {}
    seen = set()
    for values in settings:
        one = config.copy_and_resolve_references()
        for path, value in values.items():
            if unknown := config_lib.unknown_option(config, path):
                raise UserError("OPTION_UNKNOWN", f"a sweep cannot set config.{path}={value!r}: {unknown}")
            *parents, name = path.split(".")
            try:
                node = functools.reduce(operator.getitem, parents, one)
                node[name] = (value,) if path == "tasks" and isinstance(value, str) else value
            except TypeError as error:
                raise UserError("OPTION_TYPE", f"a sweep cannot set config.{path}={value!r}: {error}") from error
        trial = Trial(_name(values), json.loads(json.dumps(dict(values))), one)
        if trial.name in trials or _key(trial.settings) in seen:
            raise UserError("SWEEP_TRIAL_TWICE", f"expected different trials, got {trial.name} twice; leave one out")
        seen.add(_key(trial.settings))
        trials[trial.name] = trial
    return list(trials.values())


def _key(settings: Mapping[str, Any]) -> str:
    """Return a string that is equal for equal options."""
    return json.dumps(settings, sort_keys=True)


def _name(settings: Mapping[str, Any]) -> str:
    """Return the name of a trial's folder: "lambda_=1e-05__seed=0".

    File systems limit its length: the end of a long name is replaced by a hash of the whole name.
    """
    name = _SEPARATOR.join(f"{path.rpartition('.')[2]}={_short(value)}" for path, value in settings.items())
    if len(name.encode()) <= 240:
        return name
    return f"{name.encode()[:230].decode(errors='ignore')}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _short(value):
    """Return a value as a part of a folder's name."""
    text = ("+".join(map(str, value)) or "none") if isinstance(value, tuple | list) else str(value)
    return text.replace("attribute:", "").replace("/", "_").replace(",", "+")


def run_job(config, workdir: str | pathlib.Path, settings: Sequence[Mapping[str, Any]], options: Options) -> list[str]:
    """Run the trials that have not finished, each in its subfolder of `workdir`.

    Args:
      config: the base config.
      workdir: the sweep's folder; gets sweep.json and log.txt.
      settings: for each trial, options by dotted path.
      options: how the sweep runs.

    Returns:
      Names of the finished trials of this shard.

    Raises:
      UserError: options that are not valid, before any run starts; SWEEP_DIFFERS for the folder of another sweep.
      RunsFailed: SWEEP_RUNS_FAILED; the other runs have finished.
      Stopped: a signal asked to stop.
    """
    index, count = options.shard
    _check_options(options)
    workdir = pathlib.Path(workdir).expanduser().absolute()
    trials = make_trials(config, settings)
    opened = set()
    for trial in trials:  # check options and prepare data before any run starts
        config_lib.check(trial.config)
        if not records.is_finished(workdir / trial.name):
            state.check_source(trial.config)
        rewritten.build(trial.config.model, tasks_lib.resolve(trial.config))
        data = trial.config.data.to_json(), tuple(trial.config.tasks)
        if data not in opened:
            setup_lib.setup(trial.config)
            opened.add(data)
    mine = _claim(workdir, trials)[index::count]
    with logs.to_file(workdir / "log.txt"):
        return _run_mine(mine, workdir, options)


def _run_mine(mine: Sequence[Trial], workdir: pathlib.Path, options: Options) -> list[str]:
    """Run the trials of this shard that have not finished, as `run_job` does."""
    waiting, failed = [], []
    for trial in mine:
        folder = workdir / trial.name
        if records.is_finished(folder):
            folder_lib.check_settings(folder, trial.config)
        elif (folder / "failed.txt").exists() and not options.retry_failed:
            failed.append(trial.name)
        else:
            waiting.append(trial)
    logging.info(
        "Sweep of %d runs in %s: %d finished before, %d failed before%s, %d to run",
        len(mine), workdir, len(mine) - len(waiting) - len(failed), len(failed),
        " (--retry_failed runs them again)" if failed else "", len(waiting),
    )  # fmt: skip
    failed += _run_all(waiting, workdir, options)
    if failed:
        reasons = [f"{name} ({(workdir / name / 'failed.txt').read_text().strip()})" for name in failed]
        raise RunsFailed(
            "SWEEP_RUNS_FAILED",
            f"{len(failed)} of {len(mine)} runs failed: {'; '.join(reasons[:3])}{'; ...' if len(failed) > 3 else ''}; "
            f"see log.txt in their folders in {workdir}; --retry_failed runs them again",
        )
    return [trial.name for trial in mine]


def _check_options(options):
    if options.cluster not in ("", *CLUSTERS):
        raise UserError(
            "OPTION_UNKNOWN_VALUE",
            f"expected '' for this machine, or one of {', '.join(CLUSTERS)}, got --cluster={options.cluster!r}",
        )
    if options.max_parallel < 1:
        raise UserError("OPTION_OUT_OF_RANGE", f"expected at least 1, got --max_parallel={options.max_parallel}")


def _claim(workdir: pathlib.Path, trials: Sequence[Trial]) -> list[Trial]:
    """Write sweep.json, or read that of the same sweep.

    Returns:
      The trials by the names in sweep.json: sweeps of earlier versions separated options by commas.

    Raises:
      UserError: SWEEP_DIFFERS.
    """
    path = workdir / "sweep.json"
    if not path.exists():  # other shards write the same
        workdir.mkdir(parents=True, exist_ok=True)
        Sweep({trial.name: trial.settings for trial in trials}).write(path)
        return list(trials)
    names = {_key(settings): name for name, settings in Sweep.read(path).trials.items()}
    if names.keys() != {_key(trial.settings) for trial in trials}:
        raise UserError("SWEEP_DIFFERS", f"{workdir} holds a sweep of other trials; give another --workdir")
    return [dataclasses.replace(trial, name=names[_key(trial.settings)]) for trial in trials]


def _run_all(trials: Sequence[Trial], workdir: pathlib.Path, options: Options) -> list[str]:
    """Run the trials; return the names of those that failed."""
    for trial in trials:
        folder = workdir / trial.name
        folder.mkdir(exist_ok=True)
        if (folder / "config.json").exists():
            folder_lib.check_settings(folder, trial.config)
        files.write_json(folder / "config.json", json.loads(trial.config.to_json()))
    folders = {trial.name: str(workdir / trial.name) for trial in trials}
    with progress.phase("sweep", len(trials), "run") as shown:
        return _train(folders, workdir, options, _Runs(shown))


def _train(folders, workdir, options, runs) -> list[str]:
    """Train the runs of the folders, by name; return the names of those that failed."""
    if options.cluster:
        return _submit(folders, workdir, options, runs)
    with _passing_on(signal.SIGTERM), concurrent.futures.ThreadPoolExecutor(options.max_parallel) as pool:
        running = {pool.submit(run_trial, folder, options.register): name for name, folder in folders.items()}
        try:
            return [running[done] for done in concurrent.futures.as_completed(running)
                    if not _finished(running[done], done.result(), runs)]  # fmt: skip
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _passing_on(number):
    """Forward a signal to the processes of the runs, which save their state, and end the sweep."""

    def pass_on(number, _):
        for process in tuple(_processes):
            process.send_signal(number)
        raise Stopped("the sweep was stopped; the same command resumes it")

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = signal.signal(number, pass_on)
    try:
        yield
    finally:
        signal.signal(number, before)


def _submit(folders, workdir, options, runs) -> list[str]:
    if importlib.util.find_spec("submitit") is None:
        raise UserError("EXTRA_MISSING", "--cluster needs submitit; run pip install -e '.[slurm]'")
    import submitit

    settings = dict(options.cluster_settings)
    if options.cluster == "slurm":
        settings["slurm_array_parallelism"] = options.max_parallel
    try:
        executor = submitit.AutoExecutor(folder=workdir / "submitit", cluster=options.cluster)
        executor.update_parameters(**settings)
    except (NameError, TypeError, ValueError, RuntimeError) as error:  # submitit raises NameError for an unknown option
        raise UserError(
            "OPTION_UNKNOWN_VALUE", f"submitit does not accept --cluster_settings={settings}: {error}"
        ) from error
    if options.cluster == "slurm":
        jobs = executor.map_array(functools.partial(run_trial, register=options.register), list(folders.values()))
        ended = map(_outcome, jobs, folders.values())
        return [name for name, done in zip(folders, ended, strict=True) if not _finished(name, done, runs)]
    # The local executor would start all jobs at once.
    start = lambda folder: _outcome(executor.submit(run_trial, folder, options.register), folder)  # noqa: E731
    with concurrent.futures.ThreadPoolExecutor(options.max_parallel) as pool:
        outcomes = pool.map(start, folders.values())
        return [name for name, done in zip(folders, outcomes, strict=True) if not _finished(name, done, runs)]


def _outcome(job, folder):
    """Return what `run_trial` returned in a job of the cluster; a job that was lost, as by a time limit, has failed."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return job.result()
    except (FailedJobError, UncompletedJobError) as error:
        reason = " ".join(str(error).split())[:300]
        (pathlib.Path(folder) / "failed.txt").write_text(f"its job on the cluster was lost: {reason}\n")
        return False


def _finished(name, finished, runs) -> bool:
    """Return whether a run has finished.

    Args:
      name: the trial's name.
      finished: the value that `run_trial` returned.
      runs: progress in which the run is counted.

    Raises:
      Stopped: the run was asked to stop, which does not count as a failure.
    """
    if finished is None:
        raise Stopped(f"the run {name} was stopped; the same command resumes the sweep")
    return runs.add(name, finished)


def run_trial(folder: str | pathlib.Path, register: str = "") -> bool | None:
    """Train the run of a folder, which has its config.json, in a separate process.

    The output of the process goes to log.txt, the reason of a failure to failed.txt. If another process trains the run,
    such as one that outlived a killed sweep, wait for it.

    Args:
      folder: the run's folder.
      register: Python file that the process loads first.

    Returns:
      Whether the run has finished, None if it was asked to stop: it can be resumed.
    """
    folder = pathlib.Path(folder)
    root = installed.ROOT
    command = [sys.executable, str(root / "launch.py"), f"--config={root / 'configs' / 'run.py'}:{folder}"]
    command += [f"--register={register}"] if register else []
    with files.locked(folder / "lock", wait=True) as lock, (folder / "log.txt").open("a") as log:
        if not lock.held:
            logging.warning("%s cannot be locked on this file system: do not start a second sweep on it", folder)
        if (folder / "results.json").exists():
            return True
        (folder / "failed.txt").unlink(missing_ok=True)
        # The child inherits the lock: it is held as long as either process lives.
        with progress.phase(f"training {folder.name}"):
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock.file.fileno(),))
            _processes.add(process)
            code = process.wait()
            _processes.discard(process)
    if code == 0:
        return True
    if code in _STOPPED:
        return None
    lines = [line for line in (folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")
    (folder / "failed.txt").write_text(f"exit code {code}: {reason.removeprefix('error: ')}\n")
    return False


def benchmark_job(config, workdir: str | pathlib.Path) -> None:
    """Time the finished runs of a sweep, except those that were timed with these options on this device.

    Args:
      config: whose sections `benchmark` and `compact` are used.
      workdir: the sweep's folder.
    """
    from configs import run as run_config

    workdir = pathlib.Path(workdir).expanduser()
    names = Sweep.read(workdir / "sweep.json").trials
    folders = [workdir / name for name in names if records.is_finished(workdir / name)]
    for i, folder in enumerate(folders, 1):
        logging.info("Timing run %d of %d: %s", i, len(folders), folder.name)
        own = run_config.get_config(str(folder))
        own.benchmark, own.compact = config.benchmark, config.compact
        if not benchmark.is_done(own, folder):
            benchmark.run_job(own, folder)


class _Runs:
    """Count the runs that are done, and log each with the time left."""

    def __init__(self, shown: progress.Phase) -> None:
        shown.update(0)
        self._shown, self._failed, self._lock = shown, 0, threading.Lock()

    def add(self, name: str, finished: bool) -> bool:
        """Count a run that has ended; return whether it has finished."""
        with self._lock:
            self._shown.update(self._shown.done + 1)
            self._failed += not finished
            if self._failed:
                self._shown.set_row("failed", str(self._failed))
            log = logging.info if finished else logging.warning
            log("%s %s; %s, %d failed", name, "finished" if finished else "failed", self._shown.numbers,
                self._failed)  # fmt: skip
        return finished
