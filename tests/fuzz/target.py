"""The form of a target: how its inputs are made, and what must hold when one is run."""

import pathlib
import random
from typing import Any

from prism_jax import errors

# A refusal is one line for a user, however long the input was.
MESSAGE_CHARS = 4000


class BrokenError(AssertionError):
    """A promise about an input does not hold."""


class Target:
    """Something that reads what strangers wrote.

    An input is a function of a random generator alone, and plain data, so that it can be shown and
    made smaller. `run` may raise a known error, and nothing else.
    """

    weight = 1.0  # of the time of a long run
    num_short = 60  # inputs in the test suite
    is_slow_allowed = False  # where a process that can be killed does the work

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def make(self, rng: random.Random) -> Any:
        """Return an input."""
        raise NotImplementedError

    def run(self, given: Any) -> None:
        """Read the input; raise BrokenError when a promise is broken."""
        raise NotImplementedError

    def rebuild(self, given: Any, part: Any) -> Any:
        """Return the input with another last part, which is what is made smaller."""
        return [*given[:-1], part] if isinstance(given, list) else part


def check(target: Target, given: Any) -> None:
    """Run an input; a known error is right as long as its message is fit to be printed."""
    try:
        target.run(given)
    except errors.KnownError as error:
        require(bool(str(error).strip()), "a known error without a message")
        length = len(str(error))
        require(length <= MESSAGE_CHARS, f"a message of {length} characters")


def require(holds: bool, promise: str) -> None:
    """Raise BrokenError with the promise unless it holds."""
    if not holds:
        raise BrokenError(promise)
