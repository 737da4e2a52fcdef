"""The row of each unit of packed sequences, decided from lengths alone, by first fit.

A unit is a group of continuations of one prompt, which share a row.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# The kinds of room in a row, in the order of `Extent.needs`.
KINDS = ("tokens", "sequences", "continued_tokens", "patches", "frames", "prompt_tokens")
_OF_PROMPT = np.array([False] * 3 + [True] * 3)  # needed once, however many units have the prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """The lengths of a unit."""

    prompt: int
    prompt_tokens: int  # with its image tokens
    prompt_patches: int
    prompt_frames: int
    continued: tuple[int, ...]  # tokens of each continuation

    def needs(self) -> list[int]:
        """Return how much of each of `KINDS` the unit needs."""
        continued, count = sum(self.continued), len(self.continued)
        tokens = count * self.prompt_tokens + continued
        prompt = [self.prompt_patches, self.prompt_frames, self.prompt_tokens]
        return [tokens, count, continued, *prompt]


def place(
    extents: Sequence[Extent], *, num_rows: int, room: Sequence[int | None]
) -> list[list[int]]:
    """Return the numbers of the units of every row, empty rows last.

    First fit needs as many rows as `rows.row_shape` gives, but for the room of shared prompts, of
    which it may begin too many in a row; filling one row after the other never does.

    Args:
      room: of a row, for each of `KINDS`; None: without limit.

    Raises:
      ValueError: the units do not fit.
    """
    limits = np.array([np.iinfo(np.int64).max if limit is None else limit for limit in room])
    try:
        return _fit(extents, num_rows, limits, may_go_back=True)
    except ValueError:
        if room[-1] is None:
            raise
        return _fit(extents, num_rows, limits, may_go_back=False)


def _fit(
    extents: Sequence[Extent], num_rows: int, room: np.ndarray, *, may_go_back: bool
) -> list[list[int]]:
    """Put each unit into the first row with room, or into none before the last one begun."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    used = np.zeros((num_rows, len(KINDS)), np.int64)
    pictured: list[set[int]] = [set() for _ in range(num_rows)]
    first = 0
    for number, extent in enumerate(extents):
        needed = np.array(extent.needs())
        is_new = np.array([extent.prompt not in seen for seen in pictured])
        wanted = used + np.where(~_OF_PROMPT | is_new[:, None], needed, 0)
        fits = first + np.flatnonzero((wanted <= room).all(-1)[first:])
        if not fits.size:
            raise ValueError(
                f"unit {number} (tokens, sequences, continued tokens, patches, frames) = "
                f"{needed[:5].tolist()} fits none of {num_rows} rows of {room[:5].tolist()}"
            )
        row = int(fits[0])
        first = first if may_go_back else row
        used[row] = wanted[row]
        pictured[row].add(extent.prompt)
        rows[row].append(number)
    return rows
