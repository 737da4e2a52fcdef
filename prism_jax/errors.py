"""The errors that `main` prints as one line; any other is a bug and shows its traceback."""

from collections.abc import Callable

# In a job of several processes, how this one ends when it failed so that the others end too: called
# with the error, the line about it (None: a bug) and the exit code. See `setup.agreement.Ends`.
end_of_job: list[Callable[[BaseException, str | None, int], None]] = []


class KnownError(Exception):
    """A problem with a file, a setting or a state; the program exits with `exit_code`."""

    exit_code = 1


class InputError(KnownError, ValueError):
    """The user's input is wrong and nothing was lost: exit code 2.

    The message names the place (option, file, row), the rule and the value.
    """

    exit_code = 2


class RunError(KnownError, RuntimeError):
    """A job cannot go on although its input is right; completed work stays."""
