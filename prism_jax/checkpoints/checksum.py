"""Checksums of arrays, computed on the devices and independent of how an array is sharded.

Checkpoint storage does not detect a flipped bit in an array. Two sums over the bits of each array,
one of them weighted by position, do. They are stored with a checkpoint and compared with those of
the arrays that a restore reads.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prism_jax import tree_paths

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
# Odd, so multiplication by it is a bijection of 32-bit positions (Knuth's multiplicative hash).
_SPREAD = 2654435761
HOST = "pinned_host"  # where an optimizer may keep its states


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checksum:
    """The two sums modulo 2^32 of one array, and whether all its values are finite."""

    plain: int  # sum of the bits of each element as an unsigned integer
    weighted: int  # the same, each times (position * 2654435761 + 1)
    is_finite: bool


def checksums(leaves: Mapping[str, jax.Array]) -> dict[str, Checksum]:
    """Return the checksum of each array; equal bits give equal sums on any mesh.

    Waits for the arrays. Elements are 1, 2 or 4 bytes wide.

    Raises:
      TypeError: an array of another kind, such as a typed random key.
    """
    for name, leaf in leaves.items():
        is_number = jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == jnp.bool_
        if not is_number or leaf.dtype.itemsize not in _UNSIGNED:
            raise TypeError(f"no checksum for {name}: {leaf.dtype}{leaf.shape}")
    near = {name: x for name, x in leaves.items() if x.sharding.memory_kind != HOST}
    sums = jax.device_get(_sums(near))
    for name, leaf in leaves.items():
        if name not in near:
            # One after the other: the device has no room for all that is kept on the host.
            place = leaf.sharding.with_memory_kind("device")
            sums[name] = jax.device_get(_sums_of_one(jax.device_put(leaf, place)))
    return {
        name: Checksum(plain=int(row[0]), weighted=int(row[1]), is_finite=bool(row[2]))
        for name, row in sums.items()
    }


@jax.jit
def _sums(leaves: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    return {name: _sums_of(leaf) for name, leaf in leaves.items()}


@jax.jit
def _sums_of_one(x: jax.Array) -> jax.Array:
    return _sums_of(x)


def _sums_of(x: jax.Array) -> jax.Array:
    # Flattening a sharded array would gather it, so sum the position up from its dims instead.
    position = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(x.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        position += index * jnp.uint32(stride % 2**32)
        stride *= x.shape[dim]
    is_finite = jnp.ones((), jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.floating):
        is_finite = jnp.all(jnp.isfinite(x)).astype(jnp.uint32)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    weight = position * jnp.uint32(_SPREAD) + jnp.uint32(1)
    plain = jnp.sum(bits, dtype=jnp.uint32)
    return jnp.stack([plain, jnp.sum(bits * weight, dtype=jnp.uint32), is_finite])


def fingerprint(params: nnx.State) -> str:
    """Return 16 hex digits that change when a parameter does.

    They are saved with every checkpoint: a resumed run must not be pulled towards another policy,
    even if the folder now holds another.
    """
    sums = checksums(tree_paths.named_leaves(params))
    text = json.dumps({name: [both.plain, both.weighted] for name, both in sums.items()})
    return hashlib.sha256(text.encode()).hexdigest()[:16]
