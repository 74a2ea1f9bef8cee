"""The command line of launch.py: from arguments to a job's call."""

import contextlib
import dataclasses
import importlib
import importlib.util
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtl_sparse.runtime import installed, progress
from mtl_sparse.runtime.errors import UserError

_TUPLES = ("--config.tasks", "--config.model.attach")  # options that take names with commas between them
CONFIGS = installed.ROOT / "configs"


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
      config: the config of --config, with its overrides.
      config_path: the config file.
      config_argument: what follows the colon in --config=FILE:ARGUMENT.
      workdir: the run's folder.
      runs: folders of --runs.
      grid: the value of --grid.
      checkpoint: the value of --checkpoint.
      register: Python file of --register.
      sweep: options of `sweep.Options` as given: max_parallel, shard, retry_failed, cluster, cluster_settings.
    """

    config: Any
    config_path: pathlib.Path
    config_argument: str
    workdir: str
    runs: Sequence[str] = ()
    grid: str = ""
    checkpoint: str = ""
    register: str = ""
    sweep: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def normalize(arguments: Sequence[str]) -> list[str]:
    """Return command line arguments with the options that hold names as Python tuples.

    `--config.tasks=a,b` and `--config.tasks a,b` become `--config.tasks=('a', 'b')`: absl's tuple flag reads Python,
    and fails on a colon as in attribute:Smiling. `--job=import` without --config gets configs/nyu.py. A config file
    configs/NAME.py that does not exist in the working directory is that of this project.
    """
    given, found = list(arguments), []
    while given:
        argument = given.pop(0)
        flag, equals, value = argument.partition("=")
        if flag in _TUPLES:
            if not equals:
                if not given or given[0].startswith("--"):
                    found.append(argument)  # absl reports the missing value
                    continue
                value = given.pop(0)
            if value[:1] not in tuple("([\"'"):
                value = str(tuple(name.strip() for name in value.split(",") if name.strip()))
            argument = f"{flag}={value}"
        elif flag == "--config" and equals:
            argument = f"{flag}={_find_config(value)}"
        elif flag == "--config" and given:
            given[0] = _find_config(given[0])
        found.append(argument)
    if option(found, "--job") == "import" and not option(found, "--config"):
        found.insert(1, f"--config={CONFIGS / 'nyu.py'}")
    return found


def _find_config(value: str) -> str:
    """Return FILE[:ARGUMENT] with the path of this project's file if FILE is configs/NAME.py and does not exist."""
    path, colon, argument = value.partition(":")
    name = path.removeprefix("configs/")
    if name == path or pathlib.Path(path).exists() or not (CONFIGS / name).is_file():
        return value
    return f"{CONFIGS / name}{colon}{argument}"


def option(arguments: Sequence[str], flag: str) -> str:
    """Return the value of `--flag=value` or `--flag value`, "" if it is not there."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
    return ""


def split_names(values: Sequence[str]) -> tuple[str, ...]:
    """Return names in a tuple whose entries may hold several, with commas between them."""
    return tuple(part.strip() for value in values for part in str(value).split(","))


def existing_folders(parts: Sequence[str]) -> list[str]:
    """Return the folders of a list that was split at commas, which trials of earlier versions have in their names."""
    folders, waiting = [], []
    for part in filter(None, parts):
        waiting.append(part)
        if pathlib.Path(",".join(waiting)).expanduser().exists():
            folders.append(",".join(waiting))
            waiting = []
    return folders + waiting


def split_config(value: str) -> tuple[pathlib.Path, str]:
    """Return (path, argument) of --config=<path>:<argument>.

    Raises:
      UserError: there is no such file.
    """
    path, _, argument = value.partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError("FILE_MISSING", f"config file {path} does not exist; configs/ has those of this project")
    return pathlib.Path(path), argument


def default_workdir(job: str, path: pathlib.Path, argument: str) -> str:
    """Return runs/<name of the config>, or FOLDER of configs/run.py:FOLDER."""
    if path.stem == "run":
        return argument
    named = str(pathlib.Path("runs") / "_".join(filter(None, (path.stem, *argument.split(":")))))
    return f"{named}_lomt" if job == "lomt" and path.stem != "sweeps" else named


def run_file(path: str) -> types.ModuleType:
    """Run a Python file and return its module.

    Raises:
      UserError: there is no such file.
    """
    if not pathlib.Path(path).is_file():
        raise UserError("FILE_MISSING", f"--register={path}: there is no such file")
    spec = importlib.util.spec_from_file_location("registered", path)
    if spec is None or spec.loader is None:
        raise UserError("FILE_DAMAGED", f"expected a Python file, got --register={path}")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def parse_error(arguments: Sequence[str], error: Exception) -> str:
    """Return the message, one sentence, for an error of absl or ml_collections about command line arguments."""
    text = str(error.args[0] if error.args else error).strip("'").replace("\\n", " ").replace("\\'", "'")
    _, ours, sentence = text.rpartition("UserError: ")  # raised by a config file, and wrapped in a traceback
    if unknown := _unknown_option(arguments):
        return unknown
    if "--config must have a value" in text:
        return "which config? give --config=configs/demo.py, or another file of configs/; --help has examples"
    return " ".join(sentence.split()) if ours else f"cannot use these options: {' '.join(text.split())}"


def _unknown_option(arguments: Sequence[str]) -> str:
    """Return the message for the first --config.NAME that the config file does not have, "" if it has all."""
    path, _, argument = option(arguments, "--config").partition(":")
    try:
        config = run_file(path).get_config(*[argument] if argument else [])
    except Exception:  # the file itself is wrong, and the first error reports that
        return ""
    from mtl_sparse.training import config as config_lib

    names = (a.removeprefix("--config.").partition("=")[0] for a in arguments if a.startswith("--config."))
    return next(filter(None, (config_lib.unknown_option(config, name) for name in names)), "")


def _trials(request: Request, grid: str):
    """Return (options of each trial, `sweep.Options`) for configs/sweeps.py:NAME or for a grid."""
    from mtl_sparse.jobs import sweep

    if request.config_path.stem == "sweeps":
        from configs import sweeps

        if request.grid:
            raise UserError(
                "OPTION_CONFLICT",
                f"configs/sweeps.py:{request.config_argument} lists its trials, and so does --grid; give one of them",
            )
        trials = sweeps.trials(request.config_argument)
    else:
        trials = sweep.parse_grid(grid)
    own = str(request.config_path.absolute()) if request.config_path.stem not in ("sweeps", "run") else ""
    return trials, sweep.Options(
        max_parallel=request.sweep["max_parallel"],
        shard=sweep.parse_shard(request.sweep["shard"]),
        retry_failed=request.sweep["retry_failed"],
        cluster=request.sweep["cluster"],
        cluster_settings=sweep.parse_settings(request.sweep["cluster_settings"]),
        register=request.register or own,
    )


def _report(request):
    from mtl_sparse.jobs import report

    report.run_job(request.config, request.workdir, request.runs)


def _benchmark(request):
    from mtl_sparse.jobs import benchmark, sweep

    if (pathlib.Path(request.workdir) / "sweep.json").exists():
        sweep.benchmark_job(request.config, request.workdir)
        _report(request)
    else:
        benchmark.run_job(request.config, request.workdir)


def _sweep(request):
    from mtl_sparse.jobs import sweep
    from mtl_sparse.report import page

    out = pathlib.Path(request.workdir) / "report"
    trials, options = _trials(request, request.grid)
    try:
        sweep.run_job(request.config, request.workdir, trials, options)
    except sweep.RunsFailed as failed:
        with contextlib.suppress(UserError):  # no run has finished
            page.write([request.workdir], out)
        raise failed
    page.write([request.workdir], out)


def _lomt(request):
    from mtl_sparse.jobs import lomt

    trials, options = _trials(request, request.grid or "seed=0,1,2")
    lomt.run_job(request.config, request.workdir, trials, options, request.runs)


def _import(request):
    from mtl_sparse.jobs import import_reference

    if not request.checkpoint:
        raise UserError(
            "OPTION_MISSING",
            "--job=import needs --checkpoint=FILE, a .pt, .safetensors or .npz of the reference implementation",
        )
    import_reference.run_job(request.config, request.workdir, request.checkpoint)


def _plain(name: str) -> Callable[[Request], Any]:
    """Return a function that imports `mtl_sparse.jobs.<name>` and calls its `run_job(config, workdir)`."""

    def run(request):
        with progress.phase("loading libraries"):
            job = importlib.import_module(f"mtl_sparse.jobs.{name}")
        return job.run_job(request.config, request.workdir)

    return run


# Job by name: (call, help).
JOBS: dict[str, tuple[Callable[[Request], Any], str]] = {
    "train": (_plain("train"), "train, evaluate the best checkpoint, write the report; resumes the run in the folder"),
    "evaluate": (_plain("evaluate"), "evaluate the best checkpoint of a run and write its report again"),
    "report": (_report, "the table and plots of a run from its records, or those of a sweep, or of --runs"),
    "compact": (_plain("compact"), "remove the zero channels of a run's model: a smaller run in <workdir>/compact"),
    "benchmark": (
        _benchmark,
        "time a run's model: dense, with its zeros, and compact; in a sweep's folder, those of its runs",
    ),
    "latency": (
        _plain("latency"),
        "time compact models with random zeros before training: which sparsity.target_macs gives which speed here",
    ),
    "export": (_plain("export"), "write a run's model as a file that runs without this package: StableHLO or ONNX"),
    "sweep": (
        _sweep,
        "train the runs of configs/sweeps.py:NAME, or of --grid, that have not finished, and report them",
    ),
    "lomt": (
        _lomt,
        "find how deep a backbone each task needs from single-task sparse runs (those of --runs, or trained first), "
        "train with each head there and with all at the end, and compare",
    ),
    "import": (_import, "make a run of a checkpoint of the reference implementation, --checkpoint=FILE"),
    "prepare": (_plain("prepare"), "prepare the data and nothing else"),
}
