"""Meshes from a configuration, and the layout of parameters and batches on them."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from models import sharding
from prism_jax import errors, tree_paths

AXES = ("data", "fsdp", "sequence", "tensor", "expert")

# The default rules: rows over data and fsdp, the length of rows over sequence, weights over fsdp,
# sequence and tensor, experts over expert.
DEFAULT_RULES: dict[str, sharding.MeshAxes] = {
    "layers": None,
    "vocab": "tensor",
    "embed": ("fsdp", "sequence"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "router": None,
    "norm": None,
    "patch": None,
    "vision_embed": ("fsdp", "sequence"),
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
    "vision_positions": None,
    "score": None,
    "batch": ("data", "fsdp"),
    "images": ("data", "fsdp"),
    "act_length": "sequence",
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
    "act_experts": "expert",
    "act_vocab": "tensor",
}


def rules(pairs: Mapping[str, sharding.MeshAxes | Sequence[str]]) -> sharding.Rules:
    """Make sharding rules from a configuration; lists become tuples."""
    fixed = []
    for name, axes in pairs.items():
        value = sharding.axis_names(axes)
        unknown = [name for name in value if name not in AXES]
        if unknown:
            raise errors.InputError(
                f"mesh.rules.{name} = {axes}: no mesh axis {unknown}, of {AXES}"
            )
        fixed.append((name, value))
    return sharding.Rules(tuple(fixed))


def axis_sizes(
    sizes: Mapping[str, int],
    num_devices: int,
    *,
    num_slices: int = 1,
    max_fsdp: int | None = None,
) -> dict[str, int]:
    """Return the size of every axis; one axis may be -1, for all remaining devices.

    An axis without a size has size 1. Both `data` and `fsdp` may be -1: `fsdp` is then the largest
    power of two that divides the devices of a slice, with at most `max_fsdp` parts of a weight, and
    `data` the rest.

    Raises InputError when the sizes do not multiply to the number of devices.
    """
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise errors.InputError(f"mesh.axes: no mesh axis {unknown}, of {AXES}")
    sizes = dict.fromkeys(AXES, 1) | dict(sizes)
    free = [name for name in AXES if sizes[name] == -1]
    known = math.prod(sizes[name] for name in AXES if name not in free)
    is_one = len(free) <= 1 or set(free) == {"data", "fsdp"}
    if not is_one or known < 1 or num_devices % known or (not free and known != num_devices):
        raise errors.InputError(
            f"mesh.axes = {dict(sizes)} does not fit {num_devices} devices: the sizes must "
            f"multiply to {num_devices}, or divide it with -1 for one of them (or data and fsdp)"
        )
    left = num_devices // known
    found = {name: left if name in free else sizes[name] for name in AXES}
    if len(free) > 1:
        inner = left // num_slices
        largest = inner & -inner  # the largest power of two that divides it
        while max_fsdp is not None and largest > 1 and largest * sizes["sequence"] > max_fsdp:
            largest //= 2
        found |= {"data": left // largest, "fsdp": largest}
    return found


def make(
    sizes: Mapping[str, int],
    devices: Sequence[jax.Device] | None = None,
    *,
    max_fsdp: int | None = None,
) -> Mesh:
    """Build the mesh over all devices (or `devices`); several TPU slices lie along `data`.

    Raises InputError when the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    # Chips of a single slice may have no slice index.
    slices = {getattr(device, "slice_index", 0) for device in devices}
    sizes = axis_sizes(sizes, len(devices), num_slices=len(slices), max_fsdp=max_fsdp)
    shape = [sizes[name] for name in AXES]
    if len(slices) > 1:
        if shape[0] % len(slices):
            raise errors.InputError(
                f"mesh.axes.data = {shape[0]} must be a multiple of {len(slices)}, the number of "
                "slices"
            )
        inner = [shape[0] // len(slices), *shape[1:]]
        outer = [len(slices), *[1] * len(inner[1:])]
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices=devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "tpu":
        # A 4 x 4 torus holds an axis of size 2 only if its physical axes may be split.
        grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_shardings(state: nnx.State, mesh: Mesh, rules: sharding.Rules) -> nnx.State:
    """Return the state with the sharding of each parameter in place of its value.

    Raises InputError naming every parameter that its mesh axes do not divide.
    """
    wrong = []

    def param_sharding(path: tuple, param: nnx.Variable) -> nnx.Variable:
        spec = sharding.spec(rules, *param.get_metadata("axes"))
        for size, axes in zip(param.shape, spec, strict=True):
            parts = math.prod(mesh.shape[name] for name in sharding.axis_names(axes))
            if size % parts:
                wrong.append(
                    f"{tree_paths.path_name(path)} {param.shape}: {size} over {axes} = {parts}"
                )
        return param.replace(NamedSharding(mesh, spec))

    shardings = jax.tree_util.tree_map_with_path(
        param_sharding, state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    if wrong:
        raise errors.InputError(
            f"mesh does not divide {len(wrong)} parameters: {'; '.join(wrong[:5])}"
        )
    return shardings
