"""Run a job: python launch.py --config=configs/nyu.py --workdir=DIR [--job=train] [--config.FIELD=VALUE ...]."""

import gc
import io
import os
import signal
import sys
import traceback

from mtl_sparse.runtime import environment

if __name__ == "__main__":  # before all that takes long to import
    environment.restart_tuned()

# TensorFlow, if it is installed, only writes event files: its start-up messages would hide the run's own.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import app, flags
from ml_collections import config_flags

from mtl_sparse.jobs import cli, cli_help
from mtl_sparse.runtime import logs, progress
from mtl_sparse.runtime.errors import OF_THE_DISK, Stopped, UserError, as_os_error

_CONFIG = config_flags.DEFINE_config_file("config", None, "Options of the run, a file of configs/ or yours.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/<name of the config>.")
_JOB = flags.DEFINE_string("job", "train", f"What to do, one of {', '.join(cli.JOBS)}.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "File of --job=import: .pt (extra 'torch'), .safetensors or .npz.")
flags.DEFINE_string(
    "config_help", None, "Print the options of the config and end; --config_help=PART, those whose names contain PART."
)
_RUNS = flags.DEFINE_list("runs", [], "Folders of runs and sweeps, for --job=report and --job=lomt.")
_GRID = flags.DEFINE_string(
    "grid", "", "Trials of --job=sweep: 'sparsity.lambda_=0.0,1e-5; seed=0,1', all combinations. For lomt: 'seed=0,1'."
)
_SWEEP = {
    "max_parallel": flags.DEFINE_integer("max_parallel", 1, "Number of runs of a sweep at a time."),
    "shard": flags.DEFINE_string("shard", "0/1", "i/n: every n-th run of a sweep from the i-th on, i from 0."),
    "retry_failed": flags.DEFINE_bool("retry_failed", False, "Run the failed runs of a sweep again."),
    "cluster": flags.DEFINE_string("cluster", "", "'slurm' (extra 'slurm'), or 'local' to try it on this machine."),
    "cluster_settings": flags.DEFINE_string(
        "cluster_settings", "", "Of submitit: 'slurm_partition=gpu,timeout_min=9'."
    ),
}
_REGISTER = flags.DEFINE_string(
    "register", "", "Python file that is run first, for the data sets and tasks it registers."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0 of several processes, or 'auto' under SLURM and Open MPI."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def main(argv: list[str]) -> None:
    """Run the job."""
    if len(argv) > 1:
        raise UserError("ARGUMENT_UNKNOWN", f"unexpected argument {argv[1]!r}; use --config.FIELD=VALUE for options")
    job = _JOB.value
    if job not in cli.JOBS:
        raise UserError("JOB_UNKNOWN", f"unknown job {job!r}; the jobs are {', '.join(cli.JOBS)}")
    path, argument = cli.split_config(config_flags.get_config_filename(flags.FLAGS["config"]))
    workdir = _WORKDIR.value or cli.default_workdir(job, path, argument)
    logs.show()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale without the letters of a table ends no job
        sys.stdout.reconfigure(errors="backslashreplace")
    with progress.phase("loading libraries"):  # here, so that --help need not wait for JAX
        from mtl_sparse.runtime import compile_cache, processes
    if _COORDINATOR.value:
        if job not in ("train", "evaluate"):
            raise UserError("JOB_ONE_PROCESS", f"--coordinator works with --job=train and evaluate, not {job}")
        processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    compile_cache.enable()
    if _REGISTER.value:
        cli.run_file(_REGISTER.value)
    config = _CONFIG.value
    config.tasks = cli.split_names(config.tasks)
    gc.set_threshold(200_000, 20, 100)  # tracing makes many objects that are kept: searching them for garbage is slow
    request = cli.Request(
        config,
        path,
        argument,
        workdir,
        runs=cli.existing_folders(_RUNS.value),
        grid=_GRID.value,
        checkpoint=_CHECKPOINT.value,
        register=_REGISTER.value,
        sweep={name: flag.value for name, flag in _SWEEP.items()},
    )
    with as_os_error(workdir):
        cli.JOBS[job][0](request)


def _parse(argv):
    """Parse the flags as absl does, with errors in one sentence; print the help that they ask for, and exit."""
    if text := cli_help.asked_for(argv):
        try:
            print(text, flush=True)
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    argv, sys.argv[:] = cli.normalize(argv), cli.normalize(sys.argv)  # config_flags reads overrides from the second
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        _exit(cli.parse_error(argv, error))


def _exit(message, code=2, at_once=False):
    print(f"error: {message}" if code == 2 else message, file=sys.stderr)
    # At once: without waiting for threads of a save that failed, or for other processes, which wait for this one.
    if at_once or _one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _one_of_several():
    """Return whether this is one of several processes, which must not be left waiting for it."""
    return flags.FLAGS.is_parsed() and bool(_COORDINATOR.value)


def run(argv: list[str] | None = None) -> None:
    """Entry point: errors that the user can fix are one sentence and exit code 2; a stopped run is 75."""
    try:
        app.run(main, argv=argv, flags_parser=_parse)
    except UserError as error:
        _exit(f"{error} [{error.code}]")
    except Stopped as stopped:
        _exit(stopped, os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        _exit("interrupted; saved checkpoints are kept", 128 + signal.SIGINT)
    except OSError as error:
        if error.errno not in OF_THE_DISK and not _one_of_several():
            raise
        _exit(f"{error.strerror}: {error.filename}; saved checkpoints are kept: fix it and run again", at_once=True)
    except Exception as error:
        if not _one_of_several():
            raise
        traceback.print_exc()
        _exit(f"this process or one it waited for failed ({type(error).__name__}, see above); checkpoints are kept")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run()
