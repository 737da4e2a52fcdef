"""Rows in which each prompt stands once, however many of its continuations stand in the row.

row       P P P Q . a b c d e .      prompts in their room, then continuations
expanded  P P P a b P P P c Q d e    for attention, see `models.shared`
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from models import inputs, positions
from models.config import Qwen3VLConfig
from models.inputs import Example
from models.shared import SharedPrompts

Sequences = Sequence[tuple[int, np.ndarray]]  # number of the prompt, tokens that follow it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spot:
    """Where a continuation lies in its row."""

    start: int  # first token of the continuation in the row
    before: int  # last token of its prompt
    offset: int  # continued tokens of the row before it


def lay(
    prompts: Sequence[Example],
    rows: Sequence[Sequences],
    *,
    num_prompt_tokens: int,
    num_continued_tokens: int,
    num_expanded_tokens: int,
    num_sequences: int,
    config: Qwen3VLConfig,
) -> tuple[inputs.TextInput, list[list[Spot]]]:
    """Return the rows, and for each row the spots of its continuations.

    Args:
      num_prompt_tokens: room of a row for prompts.
      num_continued_tokens: room of a row for continuations.
      num_expanded_tokens: room of an expanded row.
      num_sequences: most sequences in a row.
    """
    num_rows, width = len(rows), num_prompt_tokens + num_continued_tokens
    nowhere = num_expanded_tokens
    arrays = {
        "tokens": np.zeros((num_rows, width), np.int32),
        "ids": np.zeros((num_rows, width), np.int32),
        "slots": np.full((num_rows, width), -1, np.int32),
        "positions": np.zeros((num_rows, 3, width), np.int32),
        "source": np.full((num_rows, nowhere), width, np.int32),
        "owner": np.full((num_rows, nowhere), width, np.int32),
        "copies": np.full((num_rows, num_prompt_tokens, num_sequences), nowhere, np.int32),
        "followers": np.full((num_rows, num_continued_tokens), nowhere, np.int32),
    }
    merge = 1 if config.vision is None else config.vision.spatial_merge_size
    spots = [
        _fill(prompts, row, {name: array[number] for name, array in arrays.items()}, merge)
        for number, row in enumerate(rows)
    ]
    expanded = inputs.pack_segments(
        [[len(prompts[prompt].tokens) + len(tokens) for prompt, tokens in row] for row in rows],
        row_length=num_expanded_tokens,
        max_segments=max(num_sequences, 2),
    )
    padding = inputs.pack_segments([[]] * num_rows, row_length=1, max_segments=2)
    text = inputs.TextInput(
        tokens=arrays["tokens"],
        positions=np.moveaxis(arrays["positions"], 1, 0),
        image_slots=arrays["slots"],
        segments=dataclasses.replace(padding, ids=arrays["ids"]),
        shared=SharedPrompts(
            **{name: arrays[name] for name in ("source", "owner", "copies", "followers")},
            segments=expanded,
        ),
    )
    return text, spots


def _fill(
    prompts: Sequence[Example], row: Sequences, arrays: dict[str, np.ndarray], merge: int
) -> list[Spot]:
    """Fill the arrays of one row."""
    room = len(arrays["copies"])
    starts: dict[int, int] = {}
    num_copies = dict.fromkeys((prompt for prompt, _ in row), 0)
    used, next_slot, there, offset = 0, 0, 0, 0
    spots = []
    for number, tokens in row:
        prompt, after = prompts[number], len(tokens)
        length = len(prompt.tokens)
        places = positions.text_positions(
            inputs.continued(prompt, tokens).token_types, prompt.grids, spatial_merge_size=merge
        )
        copy, behind = there + np.arange(length), there + length + np.arange(after)
        if number not in starts:
            starts[number] = used
            once = used + np.arange(length)
            shown = np.asarray(prompt.token_types) != positions.TEXT
            arrays["tokens"][once], arrays["ids"][once] = prompt.tokens, 1
            arrays["positions"][:, once] = places[:, :length]
            arrays["slots"][once[shown]] = next_slot + np.arange(shown.sum())
            arrays["owner"][copy] = once
            used, next_slot = used + length, next_slot + int(shown.sum())
        start = starts[number]
        follow = room + offset + np.arange(after)
        arrays["tokens"][follow], arrays["ids"][follow] = tokens, 1
        arrays["positions"][:, follow] = places[:, length:]
        arrays["source"][copy] = start + np.arange(length)
        arrays["source"][behind] = arrays["owner"][behind] = follow
        arrays["copies"][start : start + length, num_copies[number]] = copy
        arrays["followers"][offset : offset + after] = behind
        num_copies[number] += 1
        spots.append(Spot(start=room + offset, before=start + length - 1, offset=offset))
        there, offset = there + length + after, offset + after
    return spots
