"""Log output: the lines of this project and all warnings."""

import logging as stdlib_logging
import pathlib

from absl import logging


def show() -> None:
    """Show this project's log lines and all warnings; for launch.py and notebooks."""
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_worth_reading)


def _worth_reading(record: stdlib_logging.LogRecord) -> bool:
    """Return whether a log line is from this project or a warning: checkpoint and data libraries log every file."""
    parts = pathlib.Path(record.pathname).parts
    if "orbax" in parts and record.levelno >= stdlib_logging.ERROR:  # it is raised, too, and reported then
        return False
    package = set(parts[-3:-1])
    return bool(package & {"mtl_sparse", "input_pipeline", "clu"}) or record.levelno > stdlib_logging.INFO
