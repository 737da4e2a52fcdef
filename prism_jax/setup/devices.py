"""Devices, meshes and attention implementations of a run: decided once, at its start."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import attention, sharding
from prism_jax import configuration, errors, progress, row_layout
from prism_jax import mesh as mesh_lib
from prism_jax.setup import distributed

_SPLASH_ROW = 128  # of which splash attention reads multiples, see `models.attention`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """Hold how everything of a run is computed; "auto" is decided here, once."""

    mesh: Mesh
    rules: sharding.Rules
    dtype: jnp.dtype  # of activations and matmuls
    param_dtype: jnp.dtype  # of the master weights
    attention: attention.Implementation
    decode_attention: attention.Implementation

    @property
    def replicated(self) -> NamedSharding:
        """Return the sharding of what every device holds."""
        return NamedSharding(self.mesh, PartitionSpec())

    def row_parts(self) -> int:
        """Return over how many parts of the mesh the rows of a batch are spread."""
        axes = self.rules.mesh_axes("batch")
        names = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(self.mesh.shape[name] for name in names)

    def layout(self) -> row_layout.RowLayout:
        """Return what decides which rows can be computed."""
        return row_layout.RowLayout(
            row_parts=self.row_parts(),
            token_multiple=_SPLASH_ROW if self.attention == "splash" else 1,
        )


def open_devices(
    mesh: configuration.Mesh,
    model: configuration.Model,
    *,
    section: str = "model",
    place: str = "config",
) -> Devices:
    """Join the processes of the job, build the mesh and decide the implementations; tell them.

    Args:
      section: of the configuration that says type and attention, for messages.
      place: what holds it and the section `mesh`, for messages.

    Raises:
      InputError: the axes do not fit the devices, or the attention does not run on them.
    """
    distributed.join(mesh.is_distributed)
    dtype = jnp.dtype(model.dtype)
    if dtype == jnp.float32:
        # Accelerators would multiply float32 with fewer bits.
        jax.config.update("jax_default_matmul_precision", "highest")
    found = jax.devices()
    if mesh.num_devices is not None and mesh.num_devices > len(found):
        raise errors.InputError(
            f"{place}.mesh.num_devices = {mesh.num_devices}, but there are {len(found)} devices"
        )
    prefill, decode = implementations(model.attention, dtype, place=f"{place}.{section}.attention")
    devices = Devices(
        mesh=mesh_lib.make(
            dataclasses.asdict(mesh.axes), found[: mesh.num_devices], max_fsdp=mesh.max_fsdp
        ),
        rules=mesh_lib.rules(mesh_lib.DEFAULT_RULES | dict(mesh.rules)),
        dtype=dtype,
        param_dtype=jnp.dtype(model.param_dtype),
        attention=prefill,
        decode_attention=decode,
    )
    axes = " x ".join(f"{name} {size}" for name, size in devices.mesh.shape.items() if size > 1)
    progress.say(
        f"{devices.mesh.size} x {found[0].device_kind}" + (f" ({axes})" if axes else "")
        + f", {model.dtype} with {model.param_dtype} weights, attention {prefill}"
    )  # fmt: skip
    return devices


def implementations(
    name: str, dtype: jnp.dtype, *, place: str = "--attention"
) -> tuple[attention.Implementation, attention.Implementation]:
    """Return the implementations of prefill and decoding; "auto" goes by platform and type.

    Raises:
      InputError: `place` names one that this platform, type or JAX cannot run.
    """
    platform = jax.default_backend()
    if name == "auto":
        if platform == "tpu":
            name = "splash"
        elif platform == "gpu" and dtype != jnp.float32 and jax.__version_info__ >= (0, 11):
            name = "cudnn"
        else:
            name = "xla"
    needed = None
    if name == "splash" and platform != "tpu":
        needed = f"a TPU, this is a {platform}"
    elif name == "cudnn" and platform != "gpu":
        needed = f"an NVIDIA GPU, this is a {platform}"
    elif name == "cudnn" and dtype == jnp.float32:
        needed = f"bfloat16, got {dtype}"
    elif name == "cudnn" and jax.__version_info__ < (0, 11):
        needed = f"JAX 0.11 or later, this is {jax.__version__}"
    if needed is not None:
        raise errors.InputError(f"{place} = {name!r} needs {needed}")
    return name, "xla" if name == "splash" else name


def require_one_process(stage: str) -> None:
    """Raise InputError in a job of several processes, which the sampler does not serve yet."""
    if jax.process_count() > 1:
        raise errors.InputError(f"{stage} runs in one process, got {jax.process_count()}")
