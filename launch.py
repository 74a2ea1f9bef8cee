"""python launch.py --config=configs/nyu.py --workdir=DIR [--job=train] [--config.FIELD=VALUE ...]"""

import contextlib
import gc
import importlib.util
import os
import pathlib
import signal
import sys
import traceback

from mtl_sparse import environment

if __name__ == "__main__":  # before all that takes long to import
    environment.restart_tuned()

# TensorFlow only prepares data and writes event files here; its start-up notes would drown the run's own.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import app, flags
from ml_collections import config_flags

from mtl_sparse import compile_cache, logs, processes
from mtl_sparse.errors import OF_THE_DISK, Stopped, UserError, as_os_error


def _train(config, workdir):
    from mtl_sparse import train

    train.train(config, workdir)


def _evaluate(config, workdir):
    from mtl_sparse import results

    results.evaluate_best(config, workdir)


def _runs():
    """The folders of --runs; a trial's name has commas of its own."""
    folders, parts = [], []
    for part in filter(None, _RUNS.value):
        parts.append(part)
        if pathlib.Path(",".join(parts)).expanduser().exists():
            folders.append(",".join(parts))
            parts = []
    return folders + parts


def _report(config, workdir):
    from mtl_sparse.report import page, plots, records, tables

    folders = _runs()
    if folders or (pathlib.Path(workdir) / "sweep.json").exists():
        page.write(folders or [workdir], pathlib.Path(workdir) / "report")
        return
    print(tables.run_table(records.read_json(pathlib.Path(workdir) / "results.json")))
    for path in plots.draw(workdir):
        print(path)


def _prepare(config, workdir):
    from input_pipeline import datasets

    data = datasets.load(config.data)
    print(", ".join(f"{split}: {len(names)} frames" for split, names in data.names.items()))


def _compact(config, workdir):
    from mtl_sparse import compaction

    compaction.run_job(config, workdir)


def _benchmark(config, workdir):
    from mtl_sparse import benchmark, sweep

    if (pathlib.Path(workdir) / "sweep.json").exists():
        sweep.benchmark_job(config, workdir)
        _report(config, workdir)
    else:
        benchmark.run_job(config, workdir)


def _export(config, workdir):
    from mtl_sparse import export

    export.run_job(config, workdir)


def _trials(grid):
    """(settings of each trial, by configs/sweeps.py:NAME or a grid; how they are to be run)."""
    from mtl_sparse import sweep

    path, argument = _config_file()
    if path.stem == "sweeps":
        from configs import sweeps

        if _GRID.value:
            raise UserError(f"configs/sweeps.py:{argument} lists its trials, and so does --grid; give one of them")
        settings = sweeps.trials(argument)
    else:
        settings = sweep.parse_grid(grid)
    own = os.path.abspath(path) if path.stem not in ("sweeps", "run") else ""
    return settings, sweep.Options(
        max_parallel=_MAX_PARALLEL.value,
        shard=sweep.parse_shard(_SHARD.value),
        retry_failed=_RETRY_FAILED.value,
        cluster=_CLUSTER.value,
        cluster_settings=sweep.parse_settings(_CLUSTER_SETTINGS.value),
        register=_REGISTER.value or own,
    )


def _sweep(config, workdir):
    from mtl_sparse import sweep
    from mtl_sparse.report import page

    try:
        sweep.run_job(config, workdir, *_trials(_GRID.value))
    except sweep.RunsFailed as failed:
        with contextlib.suppress(UserError):  # none has finished
            page.write([workdir], pathlib.Path(workdir) / "report")
        raise failed
    page.write([workdir], pathlib.Path(workdir) / "report")


def _lomt(config, workdir):
    from mtl_sparse import lomt

    lomt.run_job(config, workdir, *_trials(_GRID.value or "seed=0,1,2"), _runs())


def _import(config, workdir):
    from mtl_sparse import import_reference

    if not _CHECKPOINT.value:
        raise UserError("--job=import needs --checkpoint=FILE, a .pt, .safetensors or .npz of the released code")
    import_reference.run_job(config, workdir, _CHECKPOINT.value)


JOBS = {
    "train": (_train, "train, evaluate the best checkpoint, write the report; goes on where the folder left off"),
    "evaluate": (_evaluate, "evaluate the best checkpoint of a run and write its report again"),
    "report": (_report, "a run's table and pictures again from its records, or those of a sweep, or of --runs"),
    "compact": (_compact, "take the zero channels out of a run's model: a smaller run in <workdir>/compact"),
    "benchmark": (
        _benchmark,
        "time a run's model: dense, with its zeros, and compact; in a sweep's folder, those of its runs",
    ),
    "export": (_export, "write a run's model as a file that runs without this package: StableHLO or ONNX"),
    "sweep": (
        _sweep,
        "train the runs of configs/sweeps.py:NAME, or of --grid, that have not finished, and report them",
    ),
    "lomt": (
        _lomt,
        "find how deep each task needs the backbone from single-task sparse runs (those of --runs, or trained first), "
        "train with each head there and with all at the end, and compare",
    ),
    "import": (_import, "make a run of a checkpoint of the released PyTorch code, --checkpoint=FILE"),
    "prepare": (_prepare, "only prepare the data, so that machines without TensorFlow can train on it"),
}

_CONFIG = config_flags.DEFINE_config_file("config", None, "Settings of the run, a file of configs/.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder; by default runs/<name of the config>, or FOLDER of configs/run.py:FOLDER."
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "File of --job=import: .pt (extra 'torch'), .safetensors or .npz.")
_RUNS = flags.DEFINE_list(
    "runs", [], "Folders of runs and sweeps: for --job=report, in place of the workdir's; for --job=lomt."
)
_GRID = flags.DEFINE_string(
    "grid",
    "",
    "Trials of --job=sweep: 'sparsity.lambda_=0.0,1e-5; seed=0,1', each with each. Seeds of lomt: 'seed=0,1,2'.",
)
_MAX_PARALLEL = flags.DEFINE_integer("max_parallel", 1, "Runs of a sweep at a time.")
_SHARD = flags.DEFINE_string("shard", "0/1", "i/n: every n-th run of a sweep from the i-th on, i from 0.")
_RETRY_FAILED = flags.DEFINE_bool("retry_failed", False, "Run those of a sweep again that failed before.")
_CLUSTER = flags.DEFINE_string("cluster", "", "'slurm' runs a sweep there, 'local' as there but here; extra 'slurm'.")
_CLUSTER_SETTINGS = flags.DEFINE_string(
    "cluster_settings", "", "Of submitit's executor: 'slurm_partition=gpu,timeout_min=600,gpus_per_node=1'."
)
_REGISTER = flags.DEFINE_string(
    "register",
    "",
    "A Python file that is run first, for the data sets and tasks that it registers; the runs of a sweep get the "
    "sweep's own config file so.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of process 0 of a run over several processes, which are started alike but for --process_id; 'auto' "
    "where SLURM or Open MPI tells JAX all of it. For --job=train and evaluate.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of a run with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_JOB = flags.DEFINE_string("job", "train", "; ".join(f"{name}: {text}" for name, (_, text) in JOBS.items()))


def main(argv):
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; settings are given as --config.FIELD=VALUE")
    if _JOB.value not in JOBS:
        raise UserError(f"unknown job {_JOB.value!r}; the jobs are {', '.join(JOBS)}")
    path, argument = _config_file()
    stem = path.stem
    named = os.path.join("runs", "_".join(filter(None, (stem, *argument.split(":")))))
    named = argument if stem == "run" else f"{named}_lomt" if _JOB.value == "lomt" and stem != "sweeps" else named
    workdir = _WORKDIR.value or named
    logs.show()
    if _COORDINATOR.value:
        if _JOB.value not in ("train", "evaluate"):
            raise UserError(f"--coordinator is for --job=train and evaluate; --job={_JOB.value} takes one process")
        processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    compile_cache.enable()
    if _REGISTER.value:
        _run_file(_REGISTER.value)
    config = _CONFIG.value
    # The flag takes a Python tuple; --config.tasks=depth,normals arrives as one name.
    config.tasks = tuple(part.strip() for name in config.tasks for part in str(name).split(","))
    gc.set_threshold(200_000, 20, 100)  # tracing makes objects that live: looking for garbage among them takes long
    with as_os_error(workdir):
        JOBS[_JOB.value][0](config, workdir)


def _run_file(path):
    """The module that the Python file makes."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"--register={path}: there is no such file")
    spec = importlib.util.spec_from_file_location("registered", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def _config_file():
    """(path, argument) of --config=<path>:<argument>."""
    path, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError(f"config file {path} does not exist; configs/ has what comes with the project")
    return pathlib.Path(path), argument


def _parse(argv):
    """absl's flags, with what is wrong told in one sentence."""
    # A tuple's flag takes Python or names with commas between, but trips over a colon there, as in attribute:Smiling.
    for arguments in (argv, sys.argv):  # config_flags looks for overrides in the second
        if "--job=import" in arguments and not any(a.partition("=")[0] == "--config" for a in arguments):
            arguments.insert(1, f"--config={pathlib.Path(__file__).parent / 'configs' / 'nyu.py'}")
        for i, argument in enumerate(arguments):
            flag, _, value = argument.partition("=")
            if flag in ("--config.tasks", "--config.model.attach") and value[:1] not in tuple("([\"'"):
                arguments[i] = f"{flag}={tuple(name.strip() for name in value.split(','))}"
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        text = str(error.args[0] if error.args else error).strip("'").replace("\\n", " ").replace("\\'", "'")
        _, ours, sentence = text.rpartition("UserError: ")  # raised by a config file, and wrapped in a traceback
        if unknown := _unknown_setting(argv):
            _exit(unknown)
        if "--config must have a value" in text:
            _exit("which config? give --config=configs/demo.py, or another file of configs/")
        _exit(" ".join(sentence.split()) if ours else f"cannot use these settings: {' '.join(text.split())}")


def _unknown_setting(argv):
    """What `run.unknown_setting` says of the first --config.NAME that the config file does not have."""
    file = next((a.partition("=")[2] for a in argv if a.startswith("--config=")), "")
    path, _, argument = file.partition(":")
    try:
        config = _run_file(path).get_config(*[argument] if argument else [])
    except Exception:  # the file itself is what is wrong, and the first error tells of it
        return ""
    from mtl_sparse import run as run_lib

    names = (a.removeprefix("--config.").partition("=")[0] for a in argv if a.startswith("--config."))
    return next(filter(None, (run_lib.unknown_setting(config, name) for name in names)), "")


def _exit(message, code=2, at_once=False):
    print(f"error: {message}" if code == 2 else message, file=sys.stderr)
    # At once means without waiting for threads of a save that failed, or for the other processes, which wait for this.
    if at_once or _one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _one_of_several():
    """Whether this is one of several processes, which must not be left waiting for it."""
    return flags.FLAGS.is_parsed() and bool(_COORDINATOR.value)


def run(argv=None):
    """Entry point: errors that the user can put right are one sentence and exit code 2; a stopped run is 75."""
    try:
        app.run(main, argv=argv, flags_parser=_parse)
    except UserError as error:
        _exit(error)
    except Stopped as stopped:
        _exit(stopped, os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        _exit("interrupted; what was saved is kept", 128 + signal.SIGINT)
    except OSError as error:
        if error.errno not in OF_THE_DISK and not _one_of_several():
            raise
        _exit(f"{error.strerror}: {error.filename}; what was saved is kept: put it right and run again", at_once=True)
    except Exception as error:
        if not _one_of_several():
            raise
        traceback.print_exc()
        _exit(f"this process or one it waited for failed ({type(error).__name__}, see above); what was saved is kept")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run()
