"""Moments in 8 bits: a code for each number, and the largest size of each block of 256.

    number   x = size of its block · v(code)        blocks lie along the last axis
    mu       v(c) = sign(c) · (c / 127)²            int8, -127 … 127
    nu       v(c) = ((c + 1) / 256)⁴                uint8, 0 … 255

Powers put more codes near 0, where most moments are: nu spans 9.6 decades, a step of it is 1.6 % at
the top of a block. It is never 0, by whose root an update would be divided. Arrays of fewer than
4096 numbers stay in float32.

Source: Dettmers et al., arXiv 2110.02861 (blocks, small arrays kept); Li et al., arXiv 2309.01507
(no code of 0 for the second moment).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

NAME = "8bit"
BLOCK = 256
LEAST_SIZE = 4096
_SIGNED_CODES, _CODES = 127, 255

# An array, or JAX's substitute for it in a rebuilt struct.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """An array in 8 bits."""

    codes: Leaf  # int8 (with sign) or uint8, in the shape of the array
    sizes: Leaf  # float32, the last axis counts blocks


def is_blocks(node: Any) -> bool:
    """Return whether this is an array in 8 bits."""
    return isinstance(node, Blocks)


def _values(codes: jax.Array, *, has_sign: bool) -> jax.Array:
    """Return the numbers of codes without sign, in a block of size 1."""
    if has_sign:
        return (codes / _SIGNED_CODES) ** 2
    return ((codes + 1) / (_CODES + 1)) ** 4


def encode(x: jax.Array, *, has_sign: bool, key: jax.Array | None) -> Blocks:
    """Return float32 numbers in 8 bits, each as one of the two values beside it.

    Args:
      has_sign: False for numbers that are never negative.
      key: of stochastic rounding, which keeps the mean; None rounds to the nearest.
    """
    length = x.shape[-1]
    num_blocks = -(-length // BLOCK)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, num_blocks * BLOCK - length)]
    blocks = jnp.pad(x, padding).reshape(*x.shape[:-1], num_blocks, BLOCK)
    sizes = jnp.abs(blocks).max(-1)
    shares = jnp.abs(blocks) / jnp.where(sizes > 0, sizes, 1.0)[..., None]
    most = _SIGNED_CODES if has_sign else _CODES
    places = shares**0.5 * most if has_sign else shares**0.25 * (most + 1) - 1
    below = jnp.clip(jnp.floor(places), 0, most - 1)
    low, high = (_values(codes, has_sign=has_sign) for codes in (below, below + 1))
    threshold = 0.5 if key is None else jax.random.uniform(key, shares.shape)
    codes = below + ((shares - low) / (high - low) > threshold)
    if has_sign:
        codes = codes * jnp.sign(blocks)
    codes = codes.astype(jnp.int8 if has_sign else jnp.uint8)
    codes = codes.reshape(*x.shape[:-1], num_blocks * BLOCK)[..., :length]
    return Blocks(codes=codes, sizes=sizes)


def decode(blocks: Blocks) -> jax.Array:
    """Return the numbers in float32."""
    codes = blocks.codes
    has_sign = codes.dtype == jnp.int8
    wide = codes.astype(jnp.float32)
    values = _values(jnp.abs(wide), has_sign=has_sign)
    if has_sign:
        values = values * jnp.sign(wide)
    sizes = jnp.repeat(blocks.sizes, BLOCK, axis=-1)[..., : codes.shape[-1]]
    return values * sizes
