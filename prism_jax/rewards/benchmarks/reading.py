"""What a scorer reads in a response."""

import dataclasses
import re
from typing import Literal

# exact: the rule names an answer without doubt. loose: it takes the nearest. guess: it draws one of
# the options, as the published scorer does. none: it finds no answer.
How = Literal["exact", "loose", "guess", "none"]

_TAG = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


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
    match = _TAG.search(response)
    return None if match is None else match.group(1).strip()


def tagged_or_all(response: str) -> str:
    """Return the text of the first `<answer>…</answer>`, without one the whole response."""
    text = tagged(response)
    return response if text is None else text
