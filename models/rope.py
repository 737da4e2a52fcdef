"""Rotary position embeddings: interleaved M-RoPE for text, 2-D for vision."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def _frequencies(dim: int, theta: float) -> Float[Array, "frequencies"]:
    """Return 1 / theta^(2i / dim) for i below dim / 2, as float32 computes it."""
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    return 1.0 / (jnp.float32(theta) ** exponents)


def text_angles(
    positions: Int[Array, "3 B T"], *, head_dim: int, theta: float, section: tuple[int, int, int]
) -> tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]:
    """Return cosines and sines of interleaved M-RoPE, float32.

    Frequency i turns with the height where i = 1, 4, 7, … < 3 x section[1], with the width where
    i = 2, 5, 8, … < 3 x section[2], and with time elsewhere.

    Source: transformers models/qwen3_vl/modeling_qwen3_vl.py recomposition_frequencies.
    """
    half = head_dim // 2
    source = np.zeros(half, np.int32)
    for dim in (1, 2):
        source[dim : 3 * section[dim] : 3] = dim
    frequencies = _frequencies(head_dim, theta)
    angles = jnp.moveaxis(positions, 0, -1)[..., source].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def vision_angles(
    coords: Int[Array, "W P 2"], *, head_dim: int, theta: float
) -> tuple[Float[Array, "W P 1 H"], Float[Array, "W P 1 H"]]:
    """Return cosines and sines for patches at (row, column), float32.

    The first quarter of a head turns with the row, the second with the column, then both again.

    Source: transformers models/qwen3_vl/modeling_qwen3_vl.py Qwen3VLVisionRotaryEmbedding.
    """
    frequencies = _frequencies(head_dim // 2, theta)
    angles = coords[..., None].astype(jnp.float32) * frequencies  # [W, P, 2, H/4]
    angles = angles.reshape(*coords.shape[:-1], -1)
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 H"], sin: Float[Array, "B T 1 H"]
) -> Float[Array, "B T N H"]:
    """Rotate each pair (i, i + H/2) of a head; computed in the dtype of the angles."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(cos.dtype) * cos + turned * sin).astype(x.dtype)
