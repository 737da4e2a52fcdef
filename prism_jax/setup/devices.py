"""Devices, meshes and attention implementations of a run: decided once, at its start."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import attention, sharding
from prism_jax import batches, configuration, errors, progress, row_layout
from prism_jax import mesh as mesh_lib
from prism_jax.setup import distributed

_SPLASH_ROW = 128  # of which splash attention reads multiples, see `models.attention`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """A machine that a plan is made for; see `commands.plan`."""

    platform: str  # as JAX names it
    memory_bytes: int  # of each device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices, types and implementations of a run; "auto" is decided here, once."""

    mesh: Mesh
    rules: sharding.Rules
    dtype: jnp.dtype  # of activations and matmuls
    param_dtype: jnp.dtype  # of the master weights
    attention: attention.Implementation
    decode_attention: attention.Implementation
    described: Described | None = None  # the mesh describes a machine that is not there

    @property
    def replicated(self) -> NamedSharding:
        """Return the sharding of an array that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def put(self, batch: Any, *, num_rows: int) -> Any:
        """Put this process's rows of a batch on its devices; see `batches.to_devices`."""
        return batches.to_devices(batch, self.mesh, self.rules, num_rows=num_rows)

    def row_parts(self) -> int:
        """Return the number of parts of the mesh over which the rows of a batch are spread."""
        return math.prod(self.mesh.shape[name] for name in self.rules.mesh_axes("batch"))

    def length_parts(self) -> int:
        """Return the number of parts into which the mesh splits the length of each row."""
        return math.prod(self.mesh.shape[name] for name in self.rules.mesh_axes("act_length"))

    def token_parts(self) -> int:
        """Return the number of parts of the mesh over which tokens are spread."""
        return self.row_parts() * self.length_parts()

    @property
    def platform(self) -> str:
        """Return the platform of the devices, as JAX names it."""
        return jax.default_backend() if self.described is None else self.described.platform

    def local_rows(self, num_rows: int) -> tuple[int, ...]:
        """Return the rows of a microbatch that this process makes; all, where none are made."""
        if self.described is not None:
            return tuple(range(num_rows))
        return tuple(batches.local_rows(num_rows, self.mesh, self.rules))

    def layout(self) -> row_layout.RowLayout:
        """Return the limits on the rows that can be computed."""
        return row_layout.RowLayout(
            row_parts=self.row_parts(),
            token_multiple=(_SPLASH_ROW if self.attention == "splash" else 1) * self.length_parts(),
            length_parts=self.length_parts(),
        )


def open_devices(
    mesh: configuration.Mesh,
    model: configuration.Model,
    *,
    section: str = "model",
    place: str = "config",
) -> Devices:
    """Join the processes of the job, build the mesh, decide the implementations and print them.

    Args:
      section: of type and attention in the configuration, for messages.
      place: prefix of this section and of `mesh`, for messages.

    Raises:
      InputError: the axes do not fit the devices, or the attention does not run on them.
    """
    distributed.join(mesh.is_distributed)
    dtype = jnp.dtype(model.dtype)
    if dtype == jnp.float32:
        # Accelerators would otherwise multiply float32 with fewer bits.
        jax.config.update("jax_default_matmul_precision", "highest")
    available = jax.devices()
    if mesh.num_devices is not None and mesh.num_devices > len(available):
        raise errors.InputError(
            f"{place}.mesh.num_devices = {mesh.num_devices}, but there are {len(available)} devices"
        )
    if mesh.num_devices not in (None, len(available)) and jax.process_count() > 1:
        raise errors.InputError(
            f"{place}.mesh.num_devices = {mesh.num_devices} must be None in a job of "
            f"{jax.process_count()} processes, whose {len(available)} devices are all used"
        )
    made = mesh_lib.make(
        dataclasses.asdict(mesh.axes), available[: mesh.num_devices], max_fsdp=mesh.max_fsdp
    )
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES | dict(mesh.rules))
    prefill, decode = implementations(
        model.attention,
        dtype,
        splits_length=any(made.shape[axis] > 1 for axis in rules.mesh_axes("act_length")),
        place=f"{place}.{section}.attention",
    )
    devices = Devices(
        mesh=made,
        rules=rules,
        dtype=dtype,
        param_dtype=jnp.dtype(model.param_dtype),
        attention=prefill,
        decode_attention=decode,
    )
    axes = " x ".join(f"{name} {size}" for name, size in devices.mesh.shape.items() if size > 1)
    progress.say(
        f"{devices.mesh.size} x {available[0].device_kind}" + (f" ({axes})" if axes else "")
        + f", {model.dtype} with {model.param_dtype} weights, attention {prefill}"
    )  # fmt: skip
    return devices


def implementations(
    name: str, dtype: jnp.dtype, *, splits_length: bool = False, place: str = "--attention"
) -> tuple[attention.Implementation, attention.Implementation]:
    """Return the implementations of prefill and decoding; "auto" goes by platform and type.

    Args:
      splits_length: a device holds parts of rows, which cuDNN cannot read.

    Raises:
      InputError: `place` names an implementation that this platform, type or JAX cannot run.
    """
    platform = jax.default_backend()
    if name == "auto":
        if platform == "tpu":
            name = "splash"
        elif platform == "gpu" and dtype != jnp.float32 and jax.__version_info__ >= (0, 11):
            name = "xla" if splits_length else "cudnn"
        else:
            name = "xla"
    needed = None
    if name == "splash" and platform != "tpu":
        needed = f"a TPU, this is a {platform}"
    elif name == "cudnn" and splits_length:
        needed = "whole rows: mesh.axes.sequence must be 1, and no rule may split act_length"
    elif name == "cudnn" and platform != "gpu":
        needed = f"an NVIDIA GPU, this is a {platform}"
    elif name == "cudnn" and dtype == jnp.float32:
        needed = f"bfloat16, got {dtype}"
    elif name == "cudnn" and jax.__version_info__ < (0, 11):
        needed = f"JAX 0.11 or later, this is {jax.__version__}"
    if needed is not None:
        raise errors.InputError(f"{place} = {name!r} needs {needed}")
    return name, "pallas" if name == "splash" else name
