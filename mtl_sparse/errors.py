"""The one error that is meant for the user's eyes."""


class UserError(ValueError):
    """Something the user can put right: bad input, a wrong setting, a checkpoint of another model.

    Its message is one sentence that names the thing and the way out; `launch.py` prints it without a
    traceback and exits with code 2.
    """
