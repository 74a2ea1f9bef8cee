"""Many runs of one config with other settings each: ordinary run folders below one, side by side and resumable."""

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
from mtl_sparse.jobs import benchmark
from mtl_sparse.models import multitask
from mtl_sparse.report import records
from mtl_sparse.runtime import files, text
from mtl_sparse.runtime.errors import Stopped, UserError
from mtl_sparse.training import config as config_lib
from mtl_sparse.training import folder as folder_lib
from mtl_sparse.training import setup as setup_lib

CLUSTERS = ("slurm", "local")  # of submitit
# Exit codes of a run that was asked to stop: see launch.py, and SIGTERM before it listens to that.
_STOPPED = (os.EX_TEMPFAIL, 128 + signal.SIGINT, -signal.SIGINT, -signal.SIGTERM)
_processes: set[subprocess.Popen] = set()  # of the runs that this sweep is at


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
      name: of its folder.
      config: its whole config.
    """

    name: str
    config: Any


@dataclasses.dataclass(frozen=True)
class Options:
    """How a sweep goes.

    Attributes:
      max_parallel: runs at a time.
      shard: (i, n), every n-th trial from the i-th on, i from 0: one of n jobs of an array.
      retry_failed: run those again that failed before.
      cluster: "" runs in processes of this machine; "slurm", or "local" to try it, through submitit.
      cluster_settings: of submitit's executor, such as {"slurm_partition": "gpu", "timeout_min": 600}.
      register: Python file that the processes of the runs load first, for its data sets and tasks.
    """

    max_parallel: int = 1
    shard: tuple[int, int] = (0, 1)
    retry_failed: bool = False
    cluster: str = ""
    cluster_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    register: str = ""


class RunsFailed(UserError):
    """Runs of a sweep failed; the others are done."""


def parse_grid(text: str) -> list[dict[str, Any]]:
    """Settings of each combination of "sparsity.lambda_=0.0,1e-5; seed=0,1"; the last name varies fastest.

    Raises:
      UserError: not of that form.
    """
    choices = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, values = part.partition("=")
        if not equals or not values.strip() or name.strip() in choices:
            raise UserError(f"--grid: {part!r} is not NAME=VALUE,VALUE,... of a name that stands once")
        try:
            parsed = ast.literal_eval(f"({values},)")
        except (ValueError, SyntaxError):
            parsed = tuple(value.strip() for value in values.split(","))
        choices[name.strip()] = parsed
    if not choices:
        raise UserError("--job=sweep needs --config=configs/sweeps.py:NAME, or --grid='NAME=VALUE,VALUE; ...'")
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard={text!r}: i/n, i from 0 to n - 1")
    return int(index), int(count)


def parse_settings(text: str) -> dict[str, Any]:
    """{"timeout_min": 600, "slurm_partition": "gpu"} of "timeout_min=600,slurm_partition=gpu"."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--cluster_settings: {part!r} is not NAME=VALUE")
        found[name] = int(value) if value.isdecimal() else value
    return found


def make_trials(config, settings: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """The base config with each of the settings, by their dotted path.

    Raises:
      UserError: a setting that the config does not have, or a value of another type, or a trial twice.
    """
    trials = {}
    for values in settings:
        one = config.copy_and_resolve_references()
        for path, value in values.items():
            if unknown := config_lib.unknown_option(config, path):
                raise UserError(f"a sweep cannot set config.{path}={value!r}: {unknown}")
            *parents, name = path.split(".")
            try:
                node = functools.reduce(operator.getitem, parents, one)
                node[name] = (value,) if path == "tasks" and isinstance(value, str) else value
            except TypeError as error:
                raise UserError(f"a sweep cannot set config.{path}={value!r}: {error}") from error
        name = _fitting(",".join(f"{path.rpartition('.')[2]}={_short(value)}" for path, value in values.items()))
        if name in trials:
            raise UserError(f"the trial {name} stands twice in this sweep")
        trials[name] = Trial(name, one)
    return list(trials.values())


def _fitting(name):
    """A name as one that file systems take: the end of a long one gives way to a number that stands for all of it."""
    if len(name.encode()) <= 240:
        return name
    return f"{name.encode()[:230].decode(errors='ignore')}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _short(value):
    """A value as a part of a folder's name."""
    text = ("+".join(map(str, value)) or "none") if isinstance(value, tuple | list) else str(value)
    return text.replace("attribute:", "").replace("/", "_")


def run_job(config, workdir: str | pathlib.Path, settings: Sequence[Mapping[str, Any]], options: Options) -> list[str]:
    """`--job=sweep`: runs the trials that have not finished, each in its folder of `workdir`.

    Returns:
      Names of the trials of this shard that have finished.

    Raises:
      UserError: settings that cannot be, or a folder of another sweep.
      RunsFailed: what it says; the others are done first.
    """
    index, count = options.shard
    if options.cluster not in ("", *CLUSTERS):
        raise UserError(f"--cluster={options.cluster!r}: it is empty for this machine, or one of {', '.join(CLUSTERS)}")
    if options.max_parallel < 1:
        raise UserError(f"--max_parallel={options.max_parallel}: it must be at least 1")
    trials = make_trials(config, settings)
    opened = set()
    for trial in trials:  # bad settings are told, and data prepared, before any run starts
        config_lib.check(trial.config)
        multitask.build(trial.config.model, tasks_lib.resolve(trial.config))
        data = trial.config.data.to_json(), tuple(trial.config.tasks)
        if data not in opened:
            setup_lib.setup(trial.config)
            opened.add(data)
    workdir = pathlib.Path(workdir).expanduser().absolute()
    _claim(workdir, settings, trials)
    mine = trials[index::count]
    waiting, failed = [], []
    for trial in mine:
        folder = workdir / trial.name
        if (folder / "results.json").exists():
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
            f"{len(failed)} of {len(mine)} runs failed: {'; '.join(reasons[:3])}{'; ...' if len(failed) > 3 else ''}; "
            f"each has a log.txt in its folder of {workdir}, and --retry_failed runs them again"
        )
    return [trial.name for trial in mine]


def _claim(workdir, settings, trials):
    """Writes sweep.json; raises UserError where the folder holds another sweep."""
    path = workdir / "sweep.json"
    value = json.loads(json.dumps({"trials": {t.name: dict(s) for t, s in zip(trials, settings, strict=True)}}))
    if not path.exists():  # other shards write the same
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(path, value)
    elif files.read_json(path) != value:
        raise UserError(f"{workdir} holds another sweep; give another --workdir")


def _run_all(trials, workdir, options) -> list[str]:
    """Runs the trials; returns the names of those that failed."""
    progress = _Progress(len(trials))
    for trial in trials:
        folder = workdir / trial.name
        folder.mkdir(exist_ok=True)
        if (folder / "config.json").exists():
            folder_lib.check_settings(folder, trial.config)
        files.write_json(folder / "config.json", json.loads(trial.config.to_json()))
    folders = {trial.name: str(workdir / trial.name) for trial in trials}
    if options.cluster:
        return _submit(folders, workdir, options, progress)
    with _passing_on(signal.SIGTERM), concurrent.futures.ThreadPoolExecutor(options.max_parallel) as pool:
        running = {pool.submit(run_trial, folder, options.register): name for name, folder in folders.items()}
        try:
            return [running[done] for done in concurrent.futures.as_completed(running)
                    if not _finished(running[done], done.result(), progress)]  # fmt: skip
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _passing_on(number):
    """The signal goes to the runs that the sweep is at, which save where they are, and the sweep ends with them."""

    def pass_on(number, _):
        for process in tuple(_processes):
            process.send_signal(number)
        raise Stopped("the sweep was stopped; the same command goes on with it")

    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    before = signal.signal(number, pass_on)
    try:
        yield
    finally:
        signal.signal(number, before)


def _submit(folders, workdir, options, progress) -> list[str]:
    if importlib.util.find_spec("submitit") is None:
        raise UserError("--cluster needs submitit: pip install -e '.[slurm]'")
    import submitit

    settings = dict(options.cluster_settings)
    if options.cluster == "slurm":
        settings["slurm_array_parallelism"] = options.max_parallel
    try:
        executor = submitit.AutoExecutor(folder=workdir / "submitit", cluster=options.cluster)
        executor.update_parameters(**settings)
    except (NameError, TypeError, ValueError, RuntimeError) as error:  # an unknown setting is a NameError there
        raise UserError(f"--cluster_settings: submitit refuses {settings} ({error})") from error
    if options.cluster == "slurm":
        jobs = executor.map_array(functools.partial(run_trial, register=options.register), list(folders.values()))
        outcomes = map(_outcome, jobs, folders.values())
        return [name for name, done in zip(folders, outcomes, strict=True) if not _finished(name, done, progress)]
    # The local executor would start all of them at once.
    start = lambda folder: _outcome(executor.submit(run_trial, folder, options.register), folder)  # noqa: E731
    with concurrent.futures.ThreadPoolExecutor(options.max_parallel) as pool:
        outcomes = pool.map(start, folders.values())
        return [name for name, done in zip(folders, outcomes, strict=True) if not _finished(name, done, progress)]


def _outcome(job, folder):
    """What `run_trial` returned in a job of the cluster; one that was lost, by its time limit say, has failed."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return job.result()
    except (FailedJobError, UncompletedJobError) as error:
        reason = " ".join(str(error).split())[:300]
        (pathlib.Path(folder) / "failed.txt").write_text(f"its job on the cluster was lost: {reason}\n")
        return False


def _finished(name, finished, progress) -> bool:
    """What `run_trial` has returned; raises Stopped where the run was stopped, which is no failure of it."""
    if finished is None:
        raise Stopped(f"the run {name} was stopped; the same command goes on with it")
    return progress.tell(name, finished)


def run_trial(folder: str, register: str = "") -> bool | None:
    """Trains the run of `folder`, whose config.json is there, in a process of its own.

    Returns whether it finished, None where it was asked to stop before: it can go on. What it prints goes to log.txt;
    the reason of a failure to failed.txt. A run that another process is at, such as one left by a sweep that was
    killed, is waited for.
    """
    folder = pathlib.Path(folder)
    config = importlib.util.find_spec("configs.run").origin
    command = [sys.executable, importlib.util.find_spec("launch").origin, f"--config={config}:{folder}"]
    command += [f"--register={register}"] if register else []
    with files.locked(folder / "lock", wait=True) as lock, (folder / "log.txt").open("a") as log:
        if not lock.held:
            logging.warning("%s cannot be locked on this file system: do not start a second sweep on it", folder)
        if (folder / "results.json").exists():
            return True
        (folder / "failed.txt").unlink(missing_ok=True)
        # The child holds the lock, too: it stays locked for as long as either lives.
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
    """`--job=benchmark` of a sweep: times its finished runs by config.benchmark, but for those that have been."""
    from configs import run as run_config

    workdir = pathlib.Path(workdir).expanduser()
    names = files.read_json(workdir / "sweep.json")["trials"]
    folders = [workdir / name for name in names if records.is_finished(workdir / name)]
    for i, folder in enumerate(folders, 1):
        logging.info("Timing run %d of %d: %s", i, len(folders), folder.name)
        own = run_config.get_config(str(folder))
        own.benchmark, own.compact = config.benchmark, config.compact
        if not benchmark.is_done(own, folder):
            benchmark.run_job(own, folder)


class _Progress:
    """Log the runs that are done and the time left, run by run."""

    def __init__(self, total):
        self._total, self._done, self._failed = total, 0, 0
        self._eta, self._lock = text.Eta(total), threading.Lock()

    def tell(self, name, finished) -> bool:
        with self._lock:
            self._done += 1
            self._failed += not finished
            logging.info(
                "%s %s; %d of %d runs, %d failed, %.0f s a run, %s left",
                name, "finished" if finished else "failed", self._done, self._total, self._failed,
                self._eta.seconds_per_unit(self._done), self._eta.left(self._done),
            )  # fmt: skip
        return finished
