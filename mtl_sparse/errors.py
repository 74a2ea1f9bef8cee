"""What ends a run early and is told in one sentence."""

import contextlib
import errno
import os
import re

# Errors of a disk that the user can put right.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)


class UserError(ValueError):
    """Something the user can put right: bad input, a wrong setting, a checkpoint of another model.

    Its message is one sentence that names the thing and the way out; `launch.py` prints it without a
    traceback and exits with code 2.
    """


class Stopped(Exception):
    """The run was asked to stop and has saved where it is; `launch.py` exits with code 75, "try again later"."""


@contextlib.contextmanager
def as_os_error(path):
    """Raises what libraries say, each in its own way, of a disk that is full or not writable as OSError with `path`."""
    try:
        yield
    except Exception as error:
        numbers = [number for number in OF_THE_DISK if os.strerror(number) in str(error)]
        code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's
        numbers = [int(code[1])] if code else numbers
        if not numbers or isinstance(error, UserError) or getattr(error, "filename", None):
            raise
        raise OSError(numbers[0], os.strerror(numbers[0]), str(path)) from error
