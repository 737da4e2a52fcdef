"""Collate examples into static shapes: a vision row per text row, in few sizes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from models import inputs
from models.config import Qwen3VLConfig
from prism_jax import errors
from prism_jax.data import packing, processor

_MAX_VISION_SHAPES = 3
# cuDNN's packed attention takes one segment for an unpacked row, and for each slot time and memory.
_LEAST_SEGMENTS = 2
_LEAST_BUCKET = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """The static sizes of a row; each entry of `row_patches` is compiled once.

    `row_patches` is empty if no row has images.
    """

    row_tokens: int
    row_examples: int
    row_patches: tuple[int, ...]  # ascending
    row_images: int

    def __post_init__(self):
        sizes = self.row_patches
        if len(sizes) > _MAX_VISION_SHAPES or list(sizes) != sorted(set(sizes)):
            raise errors.InputError(
                f"data.row_patches must hold at most {_MAX_VISION_SHAPES} ascending sizes, "
                f"got {sizes}"
            )

    def limits(self) -> packing.Limits:
        """Return the limits of a row."""
        has_images = bool(self.row_patches)
        return packing.Limits(
            tokens=self.row_tokens,
            patches=self.row_patches[-1] if has_images else 0,
            images=self.row_images if has_images else 0,
            examples=self.row_examples,
        )

    def segments_for(self, num_examples: int, num_images: int) -> tuple[int, int]:
        """Return the slots for segments of text and of patches, of few sizes: 8, 16, 32, …"""
        bucket = _LEAST_BUCKET
        while bucket < max(num_examples, num_images):
            bucket *= 2
        limits = (self.row_examples, self.row_images)
        return tuple(max(_LEAST_SEGMENTS, min(bucket, limit)) for limit in limits)

    def patches_for(self, num_patches: int) -> int | None:
        """Return the smallest size that holds `num_patches`; None if no row has images."""
        return next((size for size in self.row_patches if size >= num_patches), None)


def pixels_dtype(words: processor.Processor) -> np.dtype:
    """Return the type of `examples.from_encoded`'s pixels."""
    return np.dtype(np.uint8 if words.image_settings.is_normalised_by_model else np.float32)


def collate(
    rows: Sequence[Sequence[inputs.Example]],
    *,
    config: Qwen3VLConfig,
    shapes: Shapes,
    row_patches: int | None,
    segments: tuple[int, int],
    dtype: np.dtype,
) -> tuple[inputs.TextInput, inputs.VisionInput | None]:
    """Return the packed rows, some of which may be empty.

    Args:
      row_patches: the size of the vision rows, from `Shapes.patches_for`; None for no vision rows.
      segments: slots for segments of text and of patches, from `Shapes.segments_for`.
      dtype: of the pixels, if no row has an image.
    """
    text = inputs.pack_text(
        rows,
        config=config,
        row_tokens=shapes.row_tokens,
        max_segments=segments[0],
        num_vision_rows=len(rows),
    )
    if row_patches is None:
        return text, None
    sizes = {"row_patches": row_patches, "max_segments": segments[1]}
    vision = inputs.pack_vision(rows, config=config, num_vision_rows=len(rows), **sizes)
    if vision is None:
        # Padding alone, so that a step without images is no other program.
        vision = inputs.empty_vision(len(rows), config=config, dtype=dtype, **sizes)
    return text, vision


def lay(rows: Sequence[Sequence[np.ndarray]], *, row_tokens: int, dtype: np.dtype) -> np.ndarray:
    """Return per-token values at the tokens' positions in `collate`: [rows, T], 0 in padding."""
    laid = np.zeros((len(rows), row_tokens), dtype)
    for number, row in enumerate(rows):
        if row:
            values = np.concatenate(row)
            laid[number, : len(values)] = values
    return laid
