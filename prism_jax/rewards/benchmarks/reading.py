"""What a scorer reads in a response."""

import dataclasses
from typing import Literal

# exact: the rule names an answer without doubt. loose: it takes the nearest. guess: it draws one of
# the options, as the published scorer does. none: it finds no answer.
How = Literal["exact", "loose", "guess", "none"]

_OPEN, _CLOSE = "<answer>", "</answer>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """The answer that a scorer reads in a response.

    `is_right` is None while mathematics has to decide whether one of `truths` equals the answer.
    """

    answer: str
    is_right: bool | None
    how: How
    truths: tuple[str, ...] = ()


def tagged(response: str) -> str | None:
    """Return the text of the first `<answer>…</answer>`, None without one."""
    start = response.find(_OPEN)
    end = response.find(_CLOSE, start) if start >= 0 else -1
    return None if end < 0 else response[start + len(_OPEN) : end].strip()


def tagged_or_all(response: str) -> str:
    """Return the text of the first `<answer>…</answer>`, without one the whole response."""
    text = tagged(response)
    return response if text is None else text
