"""Pack prompts with their continuations into rows: responses, or segments of responses.

    row     P P P r r r r  P P P r r  Q Q s s s  . .
    images  of P           (shared)   of Q

Every sequence repeats the tokens of its prompt, because attention never crosses a border between
sequences, but a row holds the images of a prompt once, however many of its sequences stand there.
Where the shape has room for prompts by themselves, each stands once too:

    row     P P P Q Q .  r r r r r r s s s .       `models.shared` expands it for attention

Shapes are those of the longest prompts and responses that may come, so a run compiles one shape;
microbatches that stay empty are known by their batch and cost nothing (see `policy.loss`).

In a job of several processes each decides from lengths alone where everything lies, all alike, and
packs its rows alone: B is then the number of those.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from models import inputs, positions
from models.config import Qwen3VLConfig
from models.inputs import Example
from prism_jax import batches, errors, first_fit, shared_rows
from prism_jax.first_fit import Extent

# By their numbers; where only some are needed, those.
Prompts = Sequence[Example] | Mapping[int, Example]

# Rows in which prompts stand once are laid out for attention in this many times their length.
_EXPANSION = 2
_TILE = 128  # of an attention kernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """The tokens that follow the prompt of this number: int[n], at least one."""

    prompt: int
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Largest:
    """The bounds of a batch."""

    num_units: int  # groups of sequences that share a row
    unit_sequences: int  # sequences of one prompt in a unit
    unit_tokens: int  # of a unit: prompts with their image tokens, and the continuations
    continued_tokens: int  # of a unit: continuations alone
    prompt_patches: int  # of all images of a prompt; 0: a model or data without images
    prompt_frames: int  # images of a prompt, one frame of a video counting as one


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShape:
    """The static sizes of M microbatches with B rows each."""

    num_microbatches: int
    microbatch_rows: int
    row_tokens: int  # every sequence with a copy of its prompt, as attention reads them
    row_sequences: int
    row_continued_tokens: int
    row_patches: int
    row_frames: int
    row_prompt_tokens: int | None  # room of prompts that stand once; None: sequences repeat them
    row_prompts: int | None  # of the longest, that have room there
    # Of the rows of a microbatch, those that this process makes; None: all.
    own_rows: tuple[int, ...] | None = None

    @property
    def num_rows(self) -> int:
        """Return the rows of all microbatches, over all processes."""
        return self.num_microbatches * self.microbatch_rows

    @property
    def local_places(self) -> dict[int, int]:
        """Return the place of each row of this process, by its number among all rows."""
        rows = range(self.microbatch_rows) if self.own_rows is None else self.own_rows
        numbers = (
            m * self.microbatch_rows + row for m in range(self.num_microbatches) for row in rows
        )
        return {number: place for place, number in enumerate(numbers)}

    def any_pairs(self, num_units: int) -> int:
        """Return how many pairs of units fit, each pair of another prompt.

        Args:
          num_units: that the shape was made for.
        """
        if self.row_prompts is None:
            return num_units // 2
        if self.row_prompts == 1:
            return max(self.num_rows // 2, 1)
        # A row that is begun with half a pair has room for one prompt less.
        return max(min(num_units // 2, self.num_rows * (self.row_prompts - 1)), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """The place of a continuation."""

    row: int  # of all rows of all processes, those of the first microbatch first
    slot: int  # which sequence of the row
    start: int  # first token of the continuation in the row
    before: int  # last token of its prompt, whose hidden state predicts the first
    offset: int  # continued tokens of the row before it
    num_tokens: int  # of the continuation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """Packed rows, every leaf [M, B, ...] but the positions [M, 3, B, T], and the places."""

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
    shared_units: int | None,
    place: str,
    advice: str = "",
    own_rows: tuple[int, ...] | None = None,
) -> RowShape:
    """Return shapes into which every batch within the bounds fits.

    A row that holds u of the largest units at once holds at least u of any units when they are
    laid by first fit, so ceil(num_units / u) rows are enough.

    Args:
      patch_multiple: rows of patches are a multiple of it, as an attention may ask.
      shared_units: this many consecutive units have the same prompt, which is to stand once in a
        row; None: every sequence repeats its prompt.
      place: the part of the configuration that holds the arguments, for the error.
      advice: another way out, for the error.
      own_rows: see `RowShape`.

    Raises:
      InputError: one of the largest units does not fit a row.
    """
    units = min(row_tokens // largest.unit_tokens, row_sequences // largest.unit_sequences)
    longest = (largest.unit_tokens - largest.continued_tokens) // largest.unit_sequences
    num_prompts, prompt_tokens, continued_tokens = None, None, units * largest.continued_tokens
    if shared_units is not None:

        def prompts_of(units: int) -> int:
            # Consecutive units begin somewhere in one prompt and go on to the next ones, at most to
            # the last that there is.
            most = -(-largest.num_units // shared_units)
            return min(1 + -(-(units - 1) // shared_units), most)

        def fits(units: int) -> bool:
            needed = longest * prompts_of(units) + units * largest.continued_tokens
            is_short = units * largest.unit_tokens <= _EXPANSION * row_tokens
            return needed <= row_tokens and is_short

        most = row_sequences // largest.unit_sequences
        units = max((u for u in range(1, most + 1) if fits(u)), default=0)
        num_prompts = prompts_of(units)
        prompt_tokens = longest * num_prompts
        continued_tokens = row_tokens - prompt_tokens
    if units < 1:
        raise errors.InputError(
            f"{place}.row_tokens must be >= {largest.unit_tokens}, which the largest prompts with "
            f"their continuations need, and {place}.row_sequences >= {largest.unit_sequences}, "
            f"got {row_tokens} and {row_sequences}{advice}"
        )
    num_rows = -(-largest.num_units // units)
    if shared_units is not None:
        expanded = continued_tokens + row_sequences * longest
        row_tokens = min(_EXPANSION * row_tokens, -(-expanded // _TILE) * _TILE)
    return RowShape(
        num_microbatches=-(-num_rows // microbatch_rows),
        microbatch_rows=microbatch_rows,
        row_tokens=row_tokens,
        row_sequences=row_sequences,
        row_continued_tokens=continued_tokens,
        row_patches=-(-units * largest.prompt_patches // patch_multiple) * patch_multiple,
        row_frames=units * largest.prompt_frames,
        row_prompt_tokens=prompt_tokens,
        row_prompts=num_prompts,
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
    extents = [extent(prompts, unit) for unit in units]
    # Of all prompts, so that a process without images in its rows compiles the same program.
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
    prompts: Prompts,
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
    local = [rows[number] for number in shape.local_places]
    for unit in (unit for row in local for unit in row):
        if extent(prompts, units[unit]) != extents[unit]:
            raise ValueError(f"unit {unit} was measured as {extents[unit]} and is another")
    sequences = [[c for unit in row for c in units[unit]] for row in local]
    pictured = [list(dict.fromkeys(extents[unit].prompt for unit in row)) for row in local]
    if shape.row_prompt_tokens is None:
        text = _repeated(prompts, sequences, pictured, shape, config)
    else:
        text, _ = shared_rows.lay(
            prompts,
            [[(c.prompt, c.tokens) for c in row] for row in sequences],
            num_prompt_tokens=shape.row_prompt_tokens,
            num_continued_tokens=shape.row_continued_tokens,
            num_expanded_tokens=shape.row_tokens,
            num_sequences=shape.row_sequences,
            config=config,
        )
    vision = _vision([[prompts[p] for p in row] for row in pictured], shape, config, pixels_dtype)
    places: dict[int, list[Place]] = {}
    for number, row in enumerate(rows):
        places |= _places(number, row, extents, shape)
    return Packed(
        text=batches.split(text, shape.num_microbatches),
        vision=batches.split(vision, shape.num_microbatches),
        places=[one for unit in range(len(extents)) for one in places[unit]],
    )


def _repeated(
    prompts: Prompts,
    rows: Sequence[Sequence[Continuation]],
    pictured: Sequence[Sequence[int]],
    shape: RowShape,
    config: Qwen3VLConfig,
) -> inputs.TextInput:
    """Pack rows in which every sequence repeats its prompt."""
    text = inputs.pack_text(
        [[inputs.continued(prompts[c.prompt], c.tokens) for c in row] for row in rows],
        config=config,
        row_tokens=shape.row_tokens,
        max_segments=max(shape.row_sequences, 2),
        num_vision_rows=len(rows),
    )
    slots = np.full_like(text.image_slots, -1)
    for number, row in enumerate(rows):
        first_slots, used = _first_slots(prompts, pictured[number]), 0
        for c in row:
            shown = np.asarray(prompts[c.prompt].token_types) != positions.TEXT
            part = slots[number, used : used + len(shown)]
            part[shown] = first_slots[c.prompt] + np.arange(shown.sum())
            used += len(shown) + len(c.tokens)
    return dataclasses.replace(text, image_slots=slots)


def _places(
    number: int, row: Sequence[int], extents: Sequence[Extent], shape: RowShape
) -> dict[int, list[Place]]:
    """Return where the continuations of a row's units lie, by unit."""
    places: dict[int, list[Place]] = {}
    starts: dict[int, int] = {}  # of prompts that stand once
    used, slot, offset = 0, 0, 0
    for unit in row:
        one, places[unit] = extents[unit], []
        for num_tokens in one.continued:
            is_repeated = shape.row_prompt_tokens is None
            if is_repeated or one.prompt not in starts:
                starts[one.prompt] = used
                used += one.prompt_tokens
            place = Place(
                row=number,
                slot=slot,
                start=used if is_repeated else shape.row_prompt_tokens + offset,
                before=starts[one.prompt] + one.prompt_tokens - 1,
                offset=offset,
                num_tokens=num_tokens,
            )
            places[unit].append(place)
            used, slot = used + (num_tokens if is_repeated else 0), slot + 1
            offset += num_tokens
    return places


def extent(prompts: Prompts, unit: Sequence[Continuation]) -> Extent:
    """Measure a unit, whose continuations have one prompt."""
    (prompt,) = {c.prompt for c in unit}
    example = prompts[prompt]
    return Extent(
        prompt=prompt,
        prompt_tokens=len(example.tokens),
        prompt_patches=sum(positions.num_patches(grid) for grid in example.grids),
        prompt_frames=sum(grid[0] for grid in example.grids),
        continued=tuple(len(c.tokens) for c in unit),
    )


def place(extents: Sequence[Extent], shape: RowShape) -> list[list[int]]:
    """Return the numbers of the units of every row of all processes, see `first_fit.place`."""
    sizes = dataclasses.asdict(shape)
    room = [sizes[f"row_{kind}"] for kind in first_fit.KINDS]
    return first_fit.place(extents, num_rows=shape.num_rows, room=room)


def _first_slots(prompts: Prompts, pictured: Sequence[int]) -> dict[int, int]:
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
    sizes = {"row_patches": shape.row_patches, "max_segments": max(shape.row_frames, 2)}
    packed = inputs.pack_vision(rows, config=config, num_vision_rows=len(rows), **sizes)
    if packed is not None:
        return packed
    return inputs.empty_vision(len(rows), config=config, dtype=pixels_dtype, **sizes)
