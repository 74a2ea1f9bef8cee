"""python launch.py --config=configs/nyu.py --workdir=DIR [--job=train] [--config.FIELD=VALUE ...]"""

import errno
import logging as stdlib_logging
import os
import pathlib
import sys

# TensorFlow only prepares data and writes event files here; its start-up notes would drown the run's own.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import app, flags, logging
from ml_collections import config_flags

from mtl_sparse.errors import UserError


def _train(config, workdir):
    from mtl_sparse import train

    train.train(config, workdir)


def _evaluate(config, workdir):
    from mtl_sparse import results

    results.evaluate_best(config, workdir)


def _report(config, workdir):
    from mtl_sparse.report import plots, records, tables

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
    from mtl_sparse import benchmark

    benchmark.run_job(config, workdir)


def _export(config, workdir):
    from mtl_sparse import export

    export.run_job(config, workdir)


JOBS = {
    "train": (_train, "train, evaluate the best checkpoint, write the report; goes on where the folder left off"),
    "evaluate": (_evaluate, "evaluate the best checkpoint of a run and write its report again"),
    "report": (_report, "draw a run's table and pictures again from its records"),
    "compact": (_compact, "take the zero channels out of a run's model: a smaller run in <workdir>/compact"),
    "benchmark": (_benchmark, "time a run's model: dense, with its zeros, and compact"),
    "export": (_export, "write a run's model as a file that runs without this package: StableHLO or ONNX"),
    "prepare": (_prepare, "only prepare the data, so that machines without TensorFlow can train on it"),
}

_CONFIG = config_flags.DEFINE_config_file("config", None, "Settings of the run, a file of configs/.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder; by default runs/<name of the config>, or FOLDER of configs/run.py:FOLDER."
)
_JOB = flags.DEFINE_string("job", "train", "; ".join(f"{name}: {text}" for name, (_, text) in JOBS.items()))


def main(argv):
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; settings are given as --config.FIELD=VALUE")
    if _JOB.value not in JOBS:
        raise UserError(f"unknown job {_JOB.value!r}; the jobs are {', '.join(JOBS)}")
    path, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError(f"config file {path} does not exist; configs/ has what comes with the project")
    stem = pathlib.Path(path).stem
    named = argument if stem == "run" else os.path.join("runs", "_".join(filter(None, (stem, argument))))
    workdir = _WORKDIR.value or named
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_worth_reading)
    config = _CONFIG.value
    # The flag takes a Python tuple; --config.tasks=depth,normals arrives as one name.
    config.tasks = tuple(part.strip() for name in config.tasks for part in name.split(","))
    JOBS[_JOB.value][0](config, workdir)


def _worth_reading(record):
    """Whether a log line is ours, or a warning: checkpoint and data libraries tell every file they touch."""
    package = set(pathlib.Path(record.pathname).parts[-3:-1])
    return package & {"mtl_sparse", "input_pipeline", "clu"} or record.levelno > stdlib_logging.INFO


def _parse(argv):
    """absl's flags, with what is wrong told in one sentence."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        text = str(error.args[0] if error.args else error).strip("'").replace("\\n", " ").replace("\\'", "'")
        _, ours, sentence = text.rpartition("UserError: ")  # raised by a config file, and wrapped in a traceback
        _exit(" ".join(sentence.split()) if ours else f"cannot use these settings: {' '.join(text.split())}")


def _exit(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def run(argv=None):
    """Entry point: errors that the user can put right are one sentence and exit code 2."""
    try:
        app.run(main, argv=argv, flags_parser=_parse)
    except UserError as error:
        _exit(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        _exit(f"{error.strerror}: {error.filename}; what was saved is kept: put it right and run again")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run()
