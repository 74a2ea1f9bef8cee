"""Log output: the lines of this project and all warnings, on the terminal, as plain lines, and in a run's log.txt."""

import collections
import contextlib
import logging as stdlib_logging
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import TextIO

from absl import logging

from mtl_sparse.runtime import progress
from mtl_sparse.runtime.errors import Stopped, UserError

_handlers: list[stdlib_logging.Handler] = []  # those of `show`


def show() -> None:
    """Show this project's log lines and all warnings; for launch.py and notebooks.

    If stderr is a terminal, a live display below the lines shows the phases of `progress`. If it is not, or with
    TERM=dumb, lines have only a time and a message, without control codes. NO_COLOR leaves out the colors.
    Replaces the handler of `logging.basicConfig`, if there is one; handlers of files stay.
    """
    root = stdlib_logging.getLogger()
    for handler in (*_handlers, logging.get_absl_handler(), *filter(_is_basic, root.handlers)):
        root.removeHandler(handler)
    _handlers[:] = [_console(), _File()]
    for handler in _handlers:
        handler.addFilter(_worth_reading)
        root.addHandler(handler)
    root.setLevel(stdlib_logging.INFO)
    logging.set_verbosity(logging.INFO)
    stdlib_logging.captureWarnings(True)


def _is_basic(handler: stdlib_logging.Handler) -> bool:
    """Return whether a handler is that of `logging.basicConfig`, which Orbax calls when a notebook imports it."""
    return type(handler) is stdlib_logging.StreamHandler and handler.stream in (sys.stderr, sys.__stderr__)


def show_warnings_only() -> None:
    """Show only warnings and errors from now on: of several processes, one reports the progress."""
    logging.set_verbosity(logging.WARNING)
    stdlib_logging.getLogger().setLevel(stdlib_logging.WARNING)
    progress.set_display(None)


@contextlib.contextmanager
def to_file(path: pathlib.Path) -> Iterator[None]:
    """Append the log lines to a file: those since `show`, those of the block, and the error that the block raises.

    Does nothing if `show` was not called, or if stderr is that file, as in the runs of a sweep.

    Args:
      path: the file's path, in a folder that exists.
    """
    file = next((handler for handler in _handlers if isinstance(handler, _File)), None)
    if file is None or _is_stderr(path):
        yield
        return
    opened = path.open("a", encoding="utf-8", errors="backslashreplace")
    file.write_to(opened)
    try:
        yield
    except BaseException as error:
        file.handle(_record(error))
        raise
    finally:
        file.write_to(None)
        with contextlib.suppress(OSError):  # a full disk, again: what was not written cannot be written now
            opened.close()


def _record(error: BaseException) -> stdlib_logging.LogRecord:
    """Return the line of an error: its message if it was expected, with its traceback if not."""
    is_expected = isinstance(error, UserError | Stopped | KeyboardInterrupt)
    level = stdlib_logging.WARNING if isinstance(error, Stopped) else stdlib_logging.ERROR
    code = f" [{error.code}]" if isinstance(error, UserError) else ""
    message = f"{error}{code}" if str(error) else type(error).__name__
    info = None if is_expected else (type(error), error, error.__traceback__)
    return stdlib_logging.LogRecord("mtl_sparse", level, __file__, 0, "%s", (message,), info)


def _is_stderr(path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(sys.stderr.fileno()), path.stat())
    except (OSError, ValueError, AttributeError):  # no such file; a notebook, whose stderr is no file; or no stderr
        return False


def _console() -> stdlib_logging.Handler:
    """Return the handler of stderr, and let it show the phases if it is a terminal."""
    stderr = sys.stderr  # None if it is closed
    if stderr and stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        from mtl_sparse.runtime.terminal import Terminal  # here, because it takes a while to import rich

        terminal = Terminal(stderr)
        progress.set_display(terminal)
        return terminal
    progress.set_display(None)
    plain = stdlib_logging.StreamHandler(stderr)
    plain.setFormatter(_Lines())
    return plain


class _Lines(stdlib_logging.Formatter):
    """Time and message, and the level of what is worse than information."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: stdlib_logging.LogRecord) -> str:  # name of the standard library
        level = f"{record.levelname}: " if record.levelno > stdlib_logging.INFO else ""
        return f"{record.asctime} {level}{record.message}"


class _File(stdlib_logging.Handler):
    """Lines of a file that is opened later; the last ones are kept until then."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Lines())
        self._kept: collections.deque[str] = collections.deque(maxlen=1000)
        self._file: TextIO | None = None

    def write_to(self, file: TextIO | None) -> None:
        """Write the kept lines, then all later ones, to an open file; with None, keep later lines again."""
        self.acquire()
        self._file = file
        if file:
            self._write(file, "".join(self._kept))
            self._kept.clear()
        self.release()

    def emit(self, record: stdlib_logging.LogRecord) -> None:
        try:
            line = f"{self.format(record)}\n"
            if self._file:
                self._write(self._file, line)
            else:
                self._kept.append(line)
        except Exception:  # as the handlers of the standard library do: a line of wrong arguments ends no run
            self.handleError(record)

    def _write(self, file: TextIO, lines: str) -> None:
        try:
            file.write(lines)
            file.flush()
        except OSError:  # a full disk: the run reports it where it saves
            self._file = None


def _worth_reading(record: stdlib_logging.LogRecord) -> bool:
    """Return whether a log line is from this project or a warning: checkpoint and data libraries log every file."""
    parts = pathlib.Path(record.pathname).parts
    if "orbax" in parts and record.levelno >= stdlib_logging.ERROR:  # it is raised, too, and reported then
        return False
    package = set(parts[-3:-1])
    return bool(package & {"mtl_sparse", "input_pipeline", "clu"}) or record.levelno > stdlib_logging.INFO
