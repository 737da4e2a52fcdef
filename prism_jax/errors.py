"""The errors that `main` prints as one line; any other is a bug and keeps its traceback."""


class KnownError(Exception):
    """Something about a file, a setting or a state; `exit_code` is the program's."""

    exit_code = 1


class InputError(KnownError, ValueError):
    """The user's input is wrong, nothing was lost: exit code 2.

    The message names the place (option, file, row), the rule and the value.
    """

    exit_code = 2


class RunError(KnownError, RuntimeError):
    """A job cannot go on though its input is right; what was complete before stays."""
