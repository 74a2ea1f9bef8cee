"""Log output: the lines of this project and all warnings."""

import logging as stdlib_logging
import pathlib

from absl import logging


def show() -> None:
    """Shows how a run goes: this project's log lines and all warnings. launch.py calls it, a notebook can."""
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_worth_reading)


def _worth_reading(record):
    """Whether a log line is ours, or a warning: checkpoint and data libraries tell every file they touch."""
    parts = pathlib.Path(record.pathname).parts
    if "orbax" in parts and record.levelno >= stdlib_logging.ERROR:  # it is raised, too, and told then
        return False
    package = set(parts[-3:-1])
    return package & {"mtl_sparse", "input_pipeline", "clu"} or record.levelno > stdlib_logging.INFO
