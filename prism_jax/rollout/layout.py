"""The mesh of rollouts: copies of the weights along `data`, each cut over `tensor`.

Training cuts weights over all devices; decoding so would gather all of them for every token. The
sampler's mesh has the same devices in the same order, so that one program carries parameters over.
"""

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.typing import DTypeLike

from models.config import Qwen3VLConfig
from prism_jax.rollout import memory

_LEAST_PLACES = 65_536  # tokens of responses for which the weights must leave room


def mesh(devices: Mesh | AbstractMesh, *, tensor: int) -> Mesh | AbstractMesh:
    """Return the mesh with the devices of another, `tensor` of them a copy of the weights.

    Raises:
      ValueError: `tensor` does not divide the devices.
    """
    if devices.size % tensor:
        raise ValueError(f"rollout.tensor must divide {devices.size} devices, got {tensor}")
    sizes = {"data": devices.size // tensor, "tensor": tensor}
    shape = [sizes.get(name, 1) for name in devices.axis_names]
    if isinstance(devices, AbstractMesh):
        return AbstractMesh(tuple(shape), devices.axis_names, axis_types=devices.axis_types)
    grid = np.asarray(devices.devices).reshape(shape)
    return Mesh(grid, devices.axis_names, axis_types=(AxisType.Auto,) * len(shape))


def choose_tensor(
    params: nnx.State, config: Qwen3VLConfig, *, devices: Mesh, dtype: DTypeLike
) -> int:
    """Return the fewest devices a copy of the weights beside which responses have room.

    Where even the most leave too little, return the most that can be. A backend that does not
    report its memory is taken to have enough.
    """
    free = memory.free_bytes(list(devices.devices.flat))
    return tensor_for(params, config, num_devices=devices.size, dtype=dtype, free_bytes=free)


def tensor_for(
    params: nnx.State,
    config: Qwen3VLConfig,
    *,
    num_devices: int,
    dtype: DTypeLike,
    free_bytes: int | None,
) -> int:
    """Return the choice of `choose_tensor` by the free memory of a device; None: unknown."""
    text, size = config.text, np.dtype(dtype).itemsize
    weights = sum(leaf.size for leaf in jax.tree.leaves(params)) * size
    places = 2 * text.num_layers * text.num_kv_heads * text.head_dim * size * _LEAST_PLACES
    mlp = text.intermediate_size if text.moe is None else text.moe.intermediate_size
    cuts = [
        cut
        for cut in range(1, num_devices + 1)
        if all(n % cut == 0 for n in (num_devices, text.num_kv_heads, text.vocab_size, mlp))
    ]
    is_enough = free_bytes is None
    fitting = [cut for cut in cuts if is_enough or (weights + places) // cut <= free_bytes]
    return fitting[0] if fitting else cuts[-1]
