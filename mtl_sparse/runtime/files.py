"""Files that are always whole, and locks between processes."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from mtl_sparse.runtime.errors import UserError


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the name of a temporary file beside `path`, which replaces `path` when the block ends.

    Readers see the old file or the new one, never a part, also where several processes write the same file. If the
    block raises, `path` stays as it was.
    """
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a text file atomically, in UTF-8 whatever the locale is."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """Return the value in a JSON file.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            "FILE_MISSING", f"{path} is missing: {path.parent} holds no such run, or the run has not written it yet"
        ) from None
    except ValueError as error:  # not JSON, or not text
        raise UserError("FILE_DAMAGED", f"{path} is damaged ({error}); run the job that writes it again") from error


class Lock(NamedTuple):
    """An open lock file. `held` is False on a file system without locks."""

    file: IO[str]
    held: bool


@contextlib.contextmanager
def locked(path: pathlib.Path, *, wait: bool) -> Iterator[Lock]:
    """Hold an exclusive lock on a file, which is created if it is missing.

    The operating system releases the lock of a killed process. A child process that inherits the file keeps it locked.

    Args:
      path: the lock file; its folder must exist.
      wait: whether to wait until another process releases the lock.

    Yields:
      The lock. On a file system without locks nothing is held, and `held` is False.

    Raises:
      BlockingIOError: another process holds the lock and `wait` is False.
    """
    with path.open("a") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            held = False
        yield Lock(file, held)
