"""Errors that end a run with one sentence."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

# Disk errors that the user can fix.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)


class UserError(ValueError):
    """An error that the user can fix: bad input, a wrong option, a checkpoint of another model.

    `launch.py` prints the message without a traceback and exits with code 2.

    Attributes:
      code: a stable name of the error, such as "DATA_FOLDER_MISSING". Programs and tests match it; the message may
        change between versions.
    """

    def __init__(self, code: str, message: str | None = None) -> None:
        """Create the error.

        Args:
          code: upper-case words joined by underscores.
          message: one sentence that names the thing that is wrong and the way out. Libraries such as ml_collections
            raise errors again as `type(error)(text)`: the one argument is then the message, and the code RERAISED.

        Raises:
          TypeError: the code has another form, or the message is empty.
        """
        if message is None:
            code, message = "RERAISED", code
        if not re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*", code) or not message:
            raise TypeError(
                f"expected UserError(code, message) with a code such as FILE_MISSING, got {code!r} and {message!r}"
            )
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.code, str(self))


class Stopped(Exception):
    """The run was asked to stop and has saved its state. `launch.py` exits with code 75 ("try again later")."""


@contextlib.contextmanager
def as_os_error(path: os.PathLike | str) -> Iterator[None]:
    """Raise the disk errors of other libraries, each worded differently, as OSError with `path` as its file name."""
    try:
        yield
    except Exception as error:
        numbers = [number for number in OF_THE_DISK if os.strerror(number) in str(error)]
        code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's
        numbers = [int(code[1])] if code else numbers
        if not numbers or isinstance(error, UserError) or getattr(error, "filename", None):
            raise
        raise OSError(numbers[0], os.strerror(numbers[0]), str(path)) from error
