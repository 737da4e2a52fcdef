"""Geometry of one sequence and of one image, computed on the host with NumPy.

All values that depend on the sizes of images are computed here, so that the device graph is static.
"""

from collections.abc import Iterator, Sequence

import numpy as np

Grid = tuple[int, int, int]  # temporal patches, rows of patches, columns of patches

# The content of a token: text, a piece of an image, or a piece of a video. Token ids do not tell
# them apart: in a sampled response the id of a placeholder is a word like any other.
TEXT, IMAGE, VIDEO = 0, 1, 2


def num_patches(grid: Grid) -> int:
    """Return the number of patches of an image or video."""
    return grid[0] * grid[1] * grid[2]


def _runs(
    token_types: np.ndarray, grids: Sequence[Grid], merge: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first token, tokens, rows, columns) of each picture; each frame of a video is one."""
    is_vision = token_types != TEXT
    starts = np.flatnonzero(is_vision & ~np.concatenate([[False], is_vision[:-1]]))
    ends = np.flatnonzero(is_vision & ~np.concatenate([is_vision[1:], [False]])) + 1
    expected = []
    for number, (t, h, w) in enumerate(grids):
        if h % merge or w % merge or min(t, h, w) < 1:
            raise ValueError(f"grid {number} = {(t, h, w)}: sides must be multiples of {merge}")
        run = starts[len(expected)] if len(expected) < len(starts) else None
        # A video's frames are separate runs, each after a time stamp.
        is_video = run is not None and token_types[run] == VIDEO
        expected += [(1 if is_video else t, h // merge, w // merge)] * (t if is_video else 1)
    lengths = [depth * rows * columns for depth, rows, columns in expected]
    if [int(n) for n in ends - starts] != lengths:
        raise ValueError(
            f"runs of vision tokens have lengths {[int(n) for n in ends - starts]}, but grids "
            f"{[tuple(map(int, grid)) for grid in grids]} need {lengths}"
        )
    for start, length, (_, rows, columns) in zip(starts, lengths, expected, strict=True):
        yield int(start), length, rows, columns


def text_positions(
    token_types: np.ndarray, grids: Sequence[Grid], *, spatial_merge_size: int
) -> np.ndarray:
    """Return int32[3, T], the time, row and column of each token of one sequence.

    Each text token advances all three by one. A picture lies at one time, its rows and columns
    count up from there, and the next text starts behind its longer side.

    Args:
      token_types: int[T] of TEXT, IMAGE, VIDEO; one sequence, without padding.
      grids: one (t, h, w) in patches per image or video, in order of appearance.

    Raises:
      ValueError: when the runs of vision tokens do not fit the grids.

    Source: transformers models/qwen3_vl/modeling_qwen3_vl.py get_rope_index.
    """
    num_tokens = len(token_types)
    positions = np.zeros((3, num_tokens), np.int32)
    done = place = 0
    for start, length, rows, columns in _runs(np.asarray(token_types), grids, spatial_merge_size):
        positions[:, done:start] = place + np.arange(start - done)
        place += start - done
        area = np.indices((length // (rows * columns), rows, columns)).reshape(3, -1)
        positions[:, start : start + length] = place + area
        place += max(rows, columns)
        done = start + length
    positions[:, done:] = place + np.arange(num_tokens - done)
    return positions


def patch_coords(grid: Grid, *, spatial_merge_size: int) -> np.ndarray:
    """Return int32[P, 2], the (row, column) of each patch, in the order of the processor.

    The patches of one merged token are adjacent: the order is block row, block column, then row and
    column inside the block; frames follow one another.
    """
    t, h, w = grid
    m = spatial_merge_size
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    frame = np.stack([rows, columns], -1).reshape(h // m, m, w // m, m, 2)
    frame = frame.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    return np.tile(frame, (t, 1)).astype(np.int32)


def position_corners(
    coords: np.ndarray, grid: Grid, *, position_side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the four entries of the square table of position embeddings that each patch reads.

    The table is stretched over the image with its corners on the image's corner patches and read
    by bilinear interpolation.

    Args:
      coords: int[P, 2], (row, column) of each patch.
      position_side: rows, and columns, of the table.

    Returns:
      int32[P, 4] rows of the flat table and float32[P, 4] their weights.

    Source: transformers vision_utils.py _interpolation_axis_taps_weights, align_corners.
    """
    taps, weights = [], []
    for axis, size in ((0, grid[1]), (1, grid[2])):
        place = coords[:, axis].astype(np.float32) * (position_side - 1) / max(size - 1, 1)
        low = np.floor(place)
        taps.append(np.stack([low, np.minimum(low + 1, position_side - 1)], -1).astype(np.int32))
        weights.append(np.stack([1 - (place - low), place - low], -1).astype(np.float32))
    index = taps[0][:, :, None] * position_side + taps[1][:, None, :]
    weight = weights[0][:, :, None] * weights[1][:, None, :]
    return index.reshape(-1, 4).astype(np.int32), weight.reshape(-1, 4).astype(np.float32)
