"""The inputs of the model: packed rows of tokens and of patches, and the packing itself.

All arrays have static shapes: a row of T tokens holds several sequences, a row of P patches several
images, separated by segment numbers. Packing runs on the host with NumPy.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from models import positions
from models.config import Qwen3VLConfig

# An array, or JAX's substitute for it in a rebuilt struct: a spec, None, a tracer.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Segments:
    """The sequences or images of each row; attention never crosses their borders.

      ids     1 1 1 2 2 2 2 0 0      0 is padding, whose attention is 0
      lengths 3 4 -1 -1              each run in order; the padding at the end is none
      offsets 0 3 -1 -1 -1           start of each run; -1 beyond the last

    `lengths` and `offsets` follow from `ids`; only cuDNN's packed attention reads them.
    """

    ids: Leaf  # int32[B, T]
    lengths: Leaf  # int32[B, J]
    offsets: Leaf  # int32[B, J + 1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextInput:
    """Packed rows of tokens."""

    tokens: Leaf  # int32[B, T]
    positions: Leaf  # int32[3, B, T]  time, row, column for M-RoPE
    # int32[B, T]  index of the merged token of the vision row that stands here, -1 for text. Text
    # row b reads vision row b * W // B, so that a row and its images live on the same device.
    image_slots: Leaf
    segments: Leaf  # Segments
    # `shared.SharedPrompts` where a prompt stands once for several sequences; the segments then
    # tell padding alone. None: every sequence is whole.
    shared: Leaf = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionInput:
    """Packed rows of patches; W rows serve B rows of tokens, B a multiple of W."""

    pixels: Leaf  # float32[W, P, C] normalised, or uint8[W, P, C] to be normalised
    coords: Leaf  # int32[W, P, 2]  row and column in the image, in patches
    corners: Leaf  # int32[W, P, 4]  rows of the position table
    corner_weights: Leaf  # float32[W, P, 4]
    segments: Leaf  # Segments, one a frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence on the host: its tokens and their pictures.

    `tokens` is int[T] with one placeholder per merged token, `token_types` int[T] holds their types
    (`positions.TEXT`, `IMAGE`, `VIDEO`), `grids` one (t, h, w) in patches per image or video in
    order of appearance, and `pixels` the patches of each, [P_i, C], in the order of the processor.
    """

    tokens: np.ndarray
    token_types: np.ndarray
    grids: Sequence[positions.Grid]
    pixels: Sequence[np.ndarray]


def continued(example: Example, tokens: np.ndarray) -> Example:
    """Return the sequence with more text behind it; no id among the new tokens is a picture."""
    return dataclasses.replace(
        example,
        tokens=np.concatenate([example.tokens, tokens]),
        token_types=np.concatenate([example.token_types, np.zeros(len(tokens), np.int32)]),
    )


def pack_segments(rows: Sequence[Sequence[int]], *, row_length: int, max_segments: int) -> Segments:
    """Describe rows that hold runs of the given lengths, then padding.

    Args:
      rows: for each row the lengths of its runs, in order.
      max_segments: static number of runs per row.

    Raises:
      ValueError: when a row holds too many places or runs.
    """
    ids = np.zeros((len(rows), row_length), np.int32)
    lengths = np.full((len(rows), max_segments), -1, np.int32)
    offsets = np.full((len(rows), max_segments + 1), -1, np.int32)
    for row, runs in enumerate(rows):
        used = sum(runs)
        if used > row_length:
            raise ValueError(f"row {row} holds {used} places, but row_length is {row_length}")
        ids[row, :used] = np.repeat(np.arange(1, len(runs) + 1), runs)
        if len(runs) > max_segments:
            raise ValueError(
                f"row {row} holds {len(runs)} segments, but max_segments is {max_segments}"
            )
        lengths[row, : len(runs)] = runs
        offsets[row, : len(runs)] = np.cumsum([0, *runs])[:-1]
    return Segments(ids=ids, lengths=lengths, offsets=offsets)


def pack_text(
    rows: Sequence[Sequence[Example]],
    *,
    config: Qwen3VLConfig,
    row_tokens: int,
    max_segments: int,
    num_vision_rows: int,
) -> TextInput:
    """Lay sequences into rows of tokens.

    Args:
      rows: for each row its sequences, in order; images are numbered through each vision row in
        the order of `pack_vision`.
      num_vision_rows: rows of patches that serve these rows.
    """
    if len(rows) % num_vision_rows:
        raise ValueError(f"{len(rows)} rows must be a multiple of {num_vision_rows} vision rows")
    shape = (len(rows), row_tokens)
    tokens, places = np.zeros(shape, np.int32), np.zeros((3, *shape), np.int32)
    slots = np.full(shape, -1, np.int32)
    segments = pack_segments(
        [[len(example.tokens) for example in row] for row in rows],
        row_length=row_tokens,
        max_segments=max_segments,
    )
    merge = config.vision.spatial_merge_size if config.vision else 1
    rows_each = len(rows) // num_vision_rows
    for number, row in enumerate(rows):
        if number % rows_each == 0:
            next_slot = 0
        start = 0
        for example in row:
            part = slice(start, start + len(example.tokens))
            tokens[number, part] = example.tokens
            places[:, number, part] = positions.text_positions(
                example.token_types, example.grids, spatial_merge_size=merge
            )
            is_picture = np.asarray(example.token_types) != positions.TEXT
            slots[number, part][is_picture] = next_slot + np.arange(is_picture.sum())
            next_slot += int(is_picture.sum())
            start = part.stop
    return TextInput(tokens=tokens, positions=places, image_slots=slots, segments=segments)


def empty_vision(
    num_vision_rows: int,
    *,
    config: Qwen3VLConfig,
    row_patches: int,
    max_segments: int,
    dtype: np.dtype,
) -> VisionInput:
    """Return rows of patches that are padding alone.

    Args:
      dtype: of the pixels.
    """
    shape = (num_vision_rows, row_patches)
    return VisionInput(
        pixels=np.zeros((*shape, config.vision.patch_dim), dtype),
        coords=np.zeros((*shape, 2), np.int32),
        corners=np.zeros((*shape, 4), np.int32),
        corner_weights=np.zeros((*shape, 4), np.float32),
        segments=pack_segments(
            [[]] * num_vision_rows, row_length=row_patches, max_segments=max_segments
        ),
    )


def pack_vision(
    rows: Sequence[Sequence[Example]],
    *,
    config: Qwen3VLConfig,
    row_patches: int,
    max_segments: int,
    num_vision_rows: int,
) -> VisionInput | None:
    """Lay the images of `pack_text`'s rows into rows of patches; None where there is no image."""
    if not any(example.grids for row in rows for example in row):
        return None
    vision = config.vision
    rows_each = len(rows) // num_vision_rows
    groups = [
        [example for row in rows[g * rows_each : (g + 1) * rows_each] for example in row]
        for g in range(num_vision_rows)
    ]
    grids = [[grid for example in group for grid in example.grids] for group in groups]
    dtype = next(p.dtype for group in groups for example in group for p in example.pixels)
    sizes = {"row_patches": row_patches, "max_segments": max_segments}
    packed = dataclasses.replace(
        empty_vision(num_vision_rows, config=config, dtype=dtype, **sizes),
        segments=pack_segments(
            [[h * w for t, h, w in row for _ in range(t)] for row in grids],
            row_length=row_patches,
            max_segments=max_segments,
        ),
    )
    for number, group in enumerate(groups):
        start = 0
        for grid, pixels in (pair for e in group for pair in zip(e.grids, e.pixels, strict=True)):
            part = slice(start, start + positions.num_patches(grid))
            if pixels.shape != (part.stop - start, vision.patch_dim) or pixels.dtype != dtype:
                raise ValueError(
                    f"patches of grid {grid} must be {dtype}[{part.stop - start}, "
                    f"{vision.patch_dim}], got {pixels.dtype}{list(pixels.shape)}"
                )
            coords = positions.patch_coords(grid, spatial_merge_size=vision.spatial_merge_size)
            corners, weights = positions.position_corners(
                coords, grid, position_side=vision.position_side
            )
            packed.pixels[number, part] = pixels
            packed.coords[number, part] = coords
            packed.corners[number, part] = corners
            packed.corner_weights[number, part] = weights
            start = part.stop
    return packed
