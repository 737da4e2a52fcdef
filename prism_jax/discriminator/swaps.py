"""The teacher's segment behind another picture: a text that is right, and does not fit.

    prompt i, its picture        teacher's caption i    T
    prompt i, that of prompt j   teacher's caption i    W        loss  −log σ(T − W)

Both have the same tokens, so no length and no style tells them apart: only the picture does.
Source: arXiv 1605.05396 §4.1 (GAN-CLS): real images with mismatched texts as negatives.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models import positions
from models.inputs import Example
from prism_jax import metrics


def with_other_pictures(
    prompts: Sequence[Example], *, spatial_merge_size: int
) -> tuple[list[Example], np.ndarray]:
    """Return the prompts with the pictures of the next prompt that has any, and which changed.

    bool[N]; False without a picture, with the only one, or where the next prompt has the same.
    The numbers of grids, tokens and patches stay: where sizes differ, each patch shows the patch at
    the same relative place.
    """
    pictured = [number for number, prompt in enumerate(prompts) if prompt.grids]
    changed, is_changed = list(prompts), np.zeros(len(prompts), bool)
    for place, number in enumerate(pictured):
        other = prompts[pictured[(place + 1) % len(pictured)]]
        pixels = borrowed(prompts[number], other, spatial_merge_size)
        pairs = zip(pixels, prompts[number].pixels, strict=True)
        is_changed[number] = not all(np.array_equal(there, here) for there, here in pairs)
        changed[number] = dataclasses.replace(prompts[number], pixels=pixels)
    return changed, is_changed


def borrowed(prompt: Example, other: Example, merge: int) -> list[np.ndarray]:
    """Return the pixels of another prompt's pictures in the grids of this one's."""
    pixels_here = []
    for number, grid in enumerate(prompt.grids):
        source = number % len(other.grids)
        grid_there, pixels = other.grids[source], other.pixels[source]
        if grid_there == grid:
            pixels_here.append(pixels)
            continue
        sizes, sizes_there = np.array(grid), np.array(grid_there)
        here = _coords(grid, merge) * sizes_there // sizes
        rank = np.lexsort(_coords(grid_there, merge).T[::-1])  # patches, frame by frame, row by row
        pixels_here.append(pixels[rank[np.ravel_multi_index(here.T, grid_there)]])
    return pixels_here


def term(
    teacher: jax.Array, swapped: jax.Array, has_swap: jax.Array
) -> tuple[jax.Array, metrics.Metrics]:
    """Return the mean of −log σ(T − W) over prompts with another picture, and metrics.

    All arguments are [N], one a prompt.
    """
    losses = jnp.where(has_swap, -jax.nn.log_sigmoid(teacher - swapped), 0.0)
    count = has_swap.sum(dtype=jnp.float32)
    is_right = jnp.where(teacher == swapped, 0.5, (teacher > swapped).astype(jnp.float32))
    logged = {
        "discriminator/swap_loss": metrics.Mean(total=losses.sum(), weight=count),
        "discriminator/swap_pair_accuracy": metrics.Mean.of(is_right, has_swap),
        "discriminator/swap_gap": metrics.Mean.of(teacher - swapped, has_swap),
    }
    return losses.sum() / jnp.maximum(count, 1.0), logged


def _coords(grid: positions.Grid, merge: int) -> np.ndarray:
    """Return int[P, 3]: frame, row and column of each patch, in the order of the processor."""
    places = positions.patch_coords(grid, spatial_merge_size=merge)
    frames = np.repeat(np.arange(grid[0]), grid[1] * grid[2])
    return np.concatenate([frames[:, None], places], axis=1)
