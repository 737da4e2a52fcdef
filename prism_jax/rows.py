"""Lay prompts with what follows them into rows: responses, or the segments of responses.

    row     P P P r r r r  P P P r r  Q Q s s s  . .
    images  of P           (shared)   of Q

Every sequence repeats the tokens of its prompt, because attention never crosses a border between
sequences, but a row holds the images of a prompt once, however many of its sequences stand there.

Shapes are those of the longest prompts and responses that may come, so a run compiles one shape;
microbatches that stay empty are told by their batch and cost nothing (see `policy.loss`).

In a job of several processes each decides from lengths alone where everything lies, all alike, and
packs its own rows: B is then the number of those.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from models import inputs, positions
from models.config import Qwen3VLConfig
from models.inputs import Example
from prism_jax import batches, errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """Hold what follows the prompt of this number: int[n] tokens, at least one."""

    prompt: int
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Largest:
    """Bound what a batch may hold."""

    num_units: int  # groups of sequences that share a row
    unit_sequences: int  # sequences of one prompt in a unit
    unit_tokens: int  # of a unit: prompts with their image tokens, and what follows them
    continued_tokens: int  # of a unit: what follows the prompts alone
    prompt_patches: int  # of all images of a prompt; 0: a model or data without images
    prompt_frames: int  # images of a prompt, one frame of a video counting as one


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShape:
    """Hold the static sizes of M microbatches with B rows each."""

    num_microbatches: int
    microbatch_rows: int
    row_tokens: int
    row_sequences: int
    row_continued_tokens: int
    row_patches: int
    row_frames: int
    # Of the rows of a microbatch, those that this process makes; None: all.
    own_rows: tuple[int, ...] | None = None

    @property
    def num_rows(self) -> int:
        """Return the rows of all microbatches, over all processes."""
        return self.num_microbatches * self.microbatch_rows

    @property
    def own(self) -> dict[int, int]:
        """Return the numbers of this process's rows among all, and their places among its own."""
        rows = range(self.microbatch_rows) if self.own_rows is None else self.own_rows
        numbers = (
            m * self.microbatch_rows + row for m in range(self.num_microbatches) for row in rows
        )
        return {number: place for place, number in enumerate(numbers)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Say where a continuation lies."""

    row: int  # of all rows of all processes, those of the first microbatch first
    slot: int  # which sequence of the row
    start: int  # first token of the continuation in the row
    offset: int  # continued tokens of the row before it
    num_tokens: int  # of the continuation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """What a unit takes of its row."""

    prompt: int
    prompt_tokens: int  # with its image tokens
    prompt_patches: int
    prompt_frames: int
    continued: tuple[int, ...]  # tokens of each continuation

    @classmethod
    def of(
        cls, prompts: Sequence[Example] | Mapping[int, Example], unit: Sequence[Continuation]
    ) -> "Extent":
        """Measure a unit, whose continuations have one prompt."""
        (prompt,) = {c.prompt for c in unit}
        example = prompts[prompt]
        return cls(
            prompt=prompt,
            prompt_tokens=len(example.tokens),
            prompt_patches=sum(positions.num_patches(grid) for grid in example.grids),
            prompt_frames=sum(grid[0] for grid in example.grids),
            continued=tuple(len(c.tokens) for c in unit),
        )

    def asked(self) -> list[int]:
        """Return tokens, sequences, continued tokens, patches and frames."""
        continued, num = sum(self.continued), len(self.continued)
        tokens = num * self.prompt_tokens + continued
        return [tokens, num, continued, self.prompt_patches, self.prompt_frames]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """Hold packed rows, every leaf [M, B, ...] but the positions [M, 3, B, T], and the places."""

    text: inputs.TextInput
    vision: inputs.VisionInput | None
    places: list[Place]  # one a continuation, units in order


def row_shape(
    largest: Largest,
    *,
    row_tokens: int,
    row_sequences: int,
    microbatch_rows: int,
    patch_multiple: int,
    place: str,
    advice: str = "",
    own_rows: tuple[int, ...] | None = None,
) -> RowShape:
    """Return shapes into which every batch within the bounds fits.

    A row that holds u of the largest units at once holds at least u of any units when they are
    laid by first fit, so ceil(num_units / u) rows are enough.

    Args:
      patch_multiple: rows of patches are a multiple of it, as an attention may ask.
      place: the part of the configuration that holds the arguments, for the error.
      advice: another way out, for the error.
      own_rows: see `RowShape`.

    Raises:
      InputError: one of the largest units does not fit a row.
    """
    units = min(row_tokens // largest.unit_tokens, row_sequences // largest.unit_sequences)
    if units < 1:
        raise errors.InputError(
            f"{place}.row_tokens must be >= {largest.unit_tokens}, which the largest prompts with "
            f"what follows them need, and {place}.row_sequences >= {largest.unit_sequences}, "
            f"got {row_tokens} and {row_sequences}{advice}"
        )
    num_rows = -(-largest.num_units // units)
    return RowShape(
        num_microbatches=-(-num_rows // microbatch_rows),
        microbatch_rows=microbatch_rows,
        row_tokens=row_tokens,
        row_sequences=row_sequences,
        row_continued_tokens=units * largest.continued_tokens,
        row_patches=-(-units * largest.prompt_patches // patch_multiple) * patch_multiple,
        row_frames=units * largest.prompt_frames,
        own_rows=own_rows,
    )


def pack(
    prompts: Sequence[Example],
    units: Sequence[Sequence[Continuation]],
    shape: RowShape,
    config: Qwen3VLConfig,
) -> Packed:
    """Lay units into rows by first fit; the sequences of a unit stand side by side in one row.

    Raises:
      ValueError: they do not fit `shape`.
    """
    extents = [Extent.of(prompts, unit) for unit in units]
    # Of all prompts, so that processes whose own rows hold no image compile the same program.
    dtypes = (pixels.dtype for prompt in prompts for pixels in prompt.pixels)
    return pack_placed(
        prompts,
        units,
        extents,
        place(extents, shape),
        shape,
        config,
        pixels_dtype=next(dtypes, np.dtype(np.uint8)),
    )


def pack_placed(
    prompts: Sequence[Example] | Mapping[int, Example],
    units: Sequence[Sequence[Continuation]] | Mapping[int, Sequence[Continuation]],
    extents: Sequence[Extent],
    rows: Sequence[Sequence[int]],
    shape: RowShape,
    config: Qwen3VLConfig,
    *,
    pixels_dtype: np.dtype,
) -> Packed:
    """Lay units into the rows that `place` returned.

    Args:
      prompts, units: by their numbers; only those of this process's rows are needed.
      pixels_dtype: of rows without images, that of the others.

    Raises:
      ValueError: a unit is not as long as its extent says.
    """
    own = list(shape.own)
    mine = [rows[number] for number in own]
    for unit in (unit for row in mine for unit in row):
        if Extent.of(prompts, units[unit]) != extents[unit]:
            raise ValueError(f"unit {unit} was measured as {extents[unit]} and is another")
    text = inputs.pack_text(
        [
            [inputs.continued(prompts[c.prompt], c.tokens) for unit in row for c in units[unit]]
            for row in mine
        ],
        config=config,
        row_tokens=shape.row_tokens,
        max_segments=shape.row_sequences + 1,
        num_vision_rows=len(mine),
    )
    pictured = [list(dict.fromkeys(extents[unit].prompt for unit in row)) for row in mine]
    places: dict[int, list[Place]] = {}
    for number, row in enumerate(rows):
        used, slot, offset = 0, 0, 0
        for unit in row:
            extent = extents[unit]
            places[unit] = []
            for num_tokens in extent.continued:
                used += extent.prompt_tokens
                places[unit].append(
                    Place(row=number, slot=slot, start=used, offset=offset, num_tokens=num_tokens)
                )
                used, slot, offset = used + num_tokens, slot + 1, offset + num_tokens
    slots = np.full_like(text.image_slots, -1)
    for number, row in enumerate(mine):
        first_slots = _first_slots(prompts, pictured[number])
        for unit in row:
            prompt = extents[unit].prompt
            shown = np.asarray(prompts[prompt].token_types) != positions.TEXT
            for one in places[unit]:
                part = slots[number, one.start - len(shown) : one.start]
                part[shown] = first_slots[prompt] + np.arange(shown.sum())
    text = dataclasses.replace(text, image_slots=slots)
    vision = _vision([[prompts[p] for p in row] for row in pictured], shape, config, pixels_dtype)
    return Packed(
        text=batches.split_text(text, shape.num_microbatches),
        vision=None if vision is None else split(vision, shape),
        places=[one for unit in range(len(extents)) for one in places[unit]],
    )


def split(tree: Any, shape: RowShape) -> Any:
    """Split host arrays of this process's rows [M * B, ...] into [M, B, ...]."""
    return jax.tree.map(
        lambda x: x.reshape(shape.num_microbatches, -1, *x.shape[1:]),
        tree,
    )


def place(extents: Sequence[Extent], shape: RowShape) -> list[list[int]]:
    """Return the numbers of the units of every row of all processes, by first fit.

    Raises:
      ValueError: they do not fit `shape`.
    """
    rows: list[list[int]] = [[] for _ in range(shape.num_rows)]
    used = np.zeros((shape.num_rows, 5), np.int64)
    pictured: list[set[int]] = [set() for _ in range(shape.num_rows)]
    room = np.array(
        [
            shape.row_tokens,
            shape.row_sequences,
            shape.row_continued_tokens,
            shape.row_patches,
            shape.row_frames,
        ]
    )
    for number, extent in enumerate(extents):
        asked = np.array(extent.asked())
        is_new = np.array([extent.prompt not in seen for seen in pictured])
        wanted = used + np.where([True, True, True, False, False] | is_new[:, None], asked, 0)
        fits = np.flatnonzero((wanted <= room).all(-1))
        if not fits.size:
            raise ValueError(
                f"unit {number} (tokens, sequences, continued tokens, patches, frames) = "
                f"{asked.tolist()} fits none of {shape.num_rows} rows of {room.tolist()}"
            )
        row = int(fits[0])
        used[row] = wanted[row]
        pictured[row].add(extent.prompt)
        rows[row].append(number)
    return rows


def _first_slots(
    prompts: Sequence[Example] | Mapping[int, Example], pictured: Sequence[int]
) -> dict[int, int]:
    """Return where the image tokens of each prompt start in the vision row."""
    firsts, next_slot = {}, 0
    for prompt in pictured:
        firsts[prompt] = next_slot
        next_slot += int((np.asarray(prompts[prompt].token_types) != positions.TEXT).sum())
    return firsts


def _vision(
    rows: Sequence[Sequence[Example]],
    shape: RowShape,
    config: Qwen3VLConfig,
    pixels_dtype: np.dtype,
) -> inputs.VisionInput | None:
    """Pack the images, a vision row for each row; without any, rows of padding alone."""
    if shape.row_patches == 0:
        return None
    packed = inputs.pack_vision(
        rows,
        config=config,
        row_patches=shape.row_patches,
        max_segments=shape.row_frames + 1,
        num_vision_rows=len(rows),
    )
    if packed is not None:
        return packed
    sizes = (len(rows), shape.row_patches)
    return inputs.VisionInput(
        pixels=np.zeros((*sizes, config.vision.patch_dim), pixels_dtype),
        coords=np.zeros((*sizes, 2), np.int32),
        corners=np.zeros((*sizes, 4), np.int32),
        corner_weights=np.zeros((*sizes, 4), np.float32),
        segments=inputs.pack_segments(
            [[] for _ in rows],
            row_length=shape.row_patches,
            max_segments=shape.row_frames + 1,
        ),
    )
