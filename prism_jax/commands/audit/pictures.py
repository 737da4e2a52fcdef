"""Pictures by three keys: the file's bytes, the decoded pixels, and the look of a small copy."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from prism_jax.data import images, records

_SIDE = 16
# Correlation of two small copies from which on they look alike; a picture that was encoded again,
# or scaled, stays above it.
ALIKE = 0.995
# Aspect ratios of pictures that look alike differ by less than this factor.
_ASPECT = 1.03
_BLOCK_ROWS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """A picture: where it comes from does not count."""

    file: bytes  # 16 bytes of the SHA-256 of the file
    pixels: bytes  # 16 bytes of the SHA-256 of the decoded pixels
    look: bytes  # uint8[16 * 16], a small gray copy
    format: str
    width_pixels: int
    height_pixels: int
    num_bytes: int


def look_at(image: records.Image) -> Seen:
    """Return the keys and the sizes of a validated picture."""
    opened = images.open_stored(image)
    pixels = hashlib.sha256(repr(opened.size).encode() + opened.tobytes()).digest()
    small = opened.convert("L").resize((_SIDE, _SIDE), 4)  # Pillow's BOX: means of areas
    return Seen(
        file=bytes.fromhex(image.sha256)[:16],
        pixels=pixels[:16],
        look=small.tobytes(),
        format=images.file_format(image.data),
        width_pixels=opened.width,
        height_pixels=opened.height,
        num_bytes=len(image.data),
    )


def alike(first: Sequence[Seen], second: Sequence[Seen]) -> Iterator[tuple[int, int]]:
    """Yield the numbers of two pictures, one of each sequence, that look alike.

    Pictures of one colour look like nothing.
    """
    if not first or not second:
        return
    there, there_aspects = _vectors(second), _aspects(second)
    for start in range(0, len(first), _BLOCK_ROWS):
        block = first[start : start + _BLOCK_ROWS]
        near = _vectors(block) @ there.T >= ALIKE
        ratio = _aspects(block)[:, None] / there_aspects[None]
        near &= (ratio < _ASPECT) & (ratio > 1 / _ASPECT)
        for i, j in zip(*np.nonzero(near), strict=True):
            yield start + int(i), int(j)


def _vectors(seen: Sequence[Seen]) -> np.ndarray:
    """Return float32[n, 256] of mean 0 and length 1, or 0 for pictures of one colour."""
    looks = np.frombuffer(b"".join(one.look for one in seen), np.uint8).reshape(len(seen), -1)
    centred = looks.astype(np.float32) - looks.mean(axis=1, keepdims=True, dtype=np.float32)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    # Less than one level of gray a pixel is noise.
    return np.where(lengths > _SIDE, centred / np.maximum(lengths, 1), 0)


def _aspects(seen: Sequence[Seen]) -> np.ndarray:
    return np.array([one.width_pixels / one.height_pixels for one in seen], np.float32)
