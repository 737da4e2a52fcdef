"""Groups of parameters by regular expressions of their paths, each with a learning-rate factor."""

import re
from collections.abc import Sequence

from prism_jax import errors

Group = tuple[str, float | None]


def assign(names: Sequence[str], groups: Sequence[Group]) -> dict[str, float | None]:
    """Return the factor of each parameter, that of the first group that matches its name.

    Raises:
      InputError: a group is malformed or decides nothing, or a parameter is in none.
    """
    factors: dict[str, float | None] = {}
    for pattern, factor in groups:
        if factor is not None and not factor > 0:
            raise errors.InputError(
                f"optim.groups: the factor of {pattern!r} must be > 0, or None for frozen; "
                f"got {factor}"
            )
        matched = matching(names, [pattern], place="optim.groups")
        won = matched - set(factors)
        if not won:
            raise errors.InputError(
                f"optim.groups: {pattern!r} decides nothing, earlier groups took all it matches"
            )
        factors |= dict.fromkeys(won, factor)
    missed = [name for name in names if name not in factors]
    if missed:
        raise errors.InputError(f"optim.groups: no group matches {some(missed)}")
    if all(factor is None for factor in factors.values()):
        raise errors.InputError("optim.groups: every parameter is frozen, nothing to train")
    return factors


def matching(names: Sequence[str], patterns: Sequence[str], *, place: str) -> set[str]:
    """Return the names that a pattern matches whole.

    Args:
      place: the part of the configuration, for errors.

    Raises:
      InputError: a pattern is malformed or matches nothing.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise errors.InputError(
                f"{place}: {pattern!r} is not a regular expression: {error}"
            ) from error
        matched = {name for name in names if regex.fullmatch(name)}
        if not matched:
            raise errors.InputError(
                f"{place}: {pattern!r} matches no parameter; there are {some(names)}"
            )
        chosen |= matched
    return chosen


def some(names: Sequence[str], limit: int = 10) -> str:
    """Return the first names as text, with the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
