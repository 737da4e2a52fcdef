"""Prompts with other pictures, a change that a discriminator that looks must notice.

The numbers of grids, tokens and patches stay, so a changed prompt packs as the true one does.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from models.inputs import Example
from prism_jax.discriminator import swaps

# blank: grey; shuffled: those of another prompt; replaced: noise, the same at every measurement
Change = Literal["blank", "shuffled", "replaced"]
CHANGES: tuple[Change, ...] = get_args(Change)

_GREY = 128  # of 255; 0 where values are centred already


def changed(
    prompts: Sequence[Example], change: Change, *, spatial_merge_size: int
) -> list[Example]:
    """Return the prompts with other pixels in their pictures; prompts without stay as they are.

    "shuffled" gives each prompt the pictures of the next one that has any. Where their sizes
    differ, each patch shows the patch at the same relative place: larger and smaller pictures
    lose or repeat patches.
    """
    pictured = [number for number, prompt in enumerate(prompts) if prompt.grids]
    result = list(prompts)
    for place, number in enumerate(pictured):
        prompt = prompts[number]
        if change == "shuffled":
            other = prompts[pictured[(place + 1) % len(pictured)]]
            pixels = swaps.borrowed(prompt, other, spatial_merge_size)
        elif change == "blank":
            pixels = [_grey(picture) for picture in prompt.pixels]
        else:
            pixels = [_noise(picture, number) for picture in prompt.pixels]
        result[number] = dataclasses.replace(prompt, pixels=pixels)
    return result


def _grey(pixels: np.ndarray) -> np.ndarray:
    return np.full_like(pixels, _GREY if pixels.dtype == np.uint8 else 0)


def _noise(pixels: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if pixels.dtype == np.uint8:
        return rng.integers(0, 256, pixels.shape, np.uint8)
    return rng.uniform(-1, 1, pixels.shape).astype(pixels.dtype)
