"""What ends a run early and is told in one sentence."""


class UserError(ValueError):
    """Something the user can put right: bad input, a wrong setting, a checkpoint of another model.

    Its message is one sentence that names the thing and the way out; `launch.py` prints it without a
    traceback and exits with code 2.
    """


class Stopped(Exception):
    """The run was asked to stop and has saved where it is; `launch.py` exits with code 75, "try again later"."""
