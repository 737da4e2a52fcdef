"""A policy read from its folder and laid out for the sampler, for `generate` and `serve`."""

import dataclasses
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from models import attention, decode_attention, sharding
from models.config import Qwen3VLConfig
from prism_jax import errors
from prism_jax import mesh as mesh_lib
from prism_jax.checkpoints import model_files, pretrained
from prism_jax.rollout import engine, serving
from prism_jax.setup import devices as devices_lib

DTYPES = ("auto", "float32", "bfloat16")
ATTENTIONS = ("auto", "xla", "splash", "cudnn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """The devices and implementations of a model."""

    mesh: Mesh | None  # None: JAX's default device
    rules: sharding.Rules
    dtype: jnp.dtype | None  # of the computation; None: as stored
    prefill: attention.Implementation
    decode: decode_attention.Implementation

    @classmethod
    def of(
        cls,
        folder: pathlib.Path,
        *,
        role: pretrained.Role,
        dtype: str,
        tensor: int,
        attention: str,
    ) -> "Place":
        """Return the place of a folder's model.

        Args:
          role: which model, where the folder is a run that trained two.
          tensor: devices over which each weight is split.

        Raises:
          InputError: the weights cannot be split so, or the attention does not run here.
        """
        files = model_files.of(folder, is_discriminator=role == "discriminator")
        num_kv_heads = pretrained.config_of(files)[1].text.num_kv_heads
        if num_kv_heads % tensor:
            raise errors.InputError(f"--tensor must divide {num_kv_heads} kv heads, got {tensor}")
        mesh, rules = None, sharding.REPLICATED
        if tensor > 1:
            sizes = {"data": 1, "fsdp": 1, "tensor": tensor, "expert": 1}
            mesh = mesh_lib.make(sizes, jax.devices()[:tensor])
            rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES)
        chosen = None if dtype == "auto" else jnp.dtype(dtype)
        used = (
            jnp.dtype(pretrained.Source.of(folder, role=role).dtype) if chosen is None else chosen
        )
        if used == jnp.float32:
            # Accelerators would otherwise multiply float32 with fewer bits.
            jax.config.update("jax_default_matmul_precision", "highest")
        prefill, decode = devices_lib.implementations(attention, used)
        return cls(mesh=mesh, rules=rules, dtype=chosen, prefill=prefill, decode=decode)

    def shardings(self, params: nnx.State) -> nnx.State | None:
        """Return where abstract parameters lie; None: where JAX puts them."""
        return (
            None if self.mesh is None else mesh_lib.param_shardings(params, self.mesh, self.rules)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy in memory, its decoder's layers one by one."""

    config: Qwen3VLConfig
    graphdef: nnx.GraphDef
    params: nnx.State
    place: Place

    @classmethod
    def load(
        cls,
        folder: pathlib.Path,
        place: Place,
        say: Callable[[str], None],
        *,
        step: int | str | None = None,
    ) -> "Policy":
        """Read a policy from a folder of any form.

        Args:
          step: of a training run, see `pretrained.Source.of`.
        """
        begun = time.perf_counter()
        model = pretrained.load(
            folder,
            mesh=place.mesh,
            rules=place.rules,
            dtype=place.dtype,
            param_dtype=place.dtype,
            step=step,
        )
        graphdef, params = serving.prepare(
            model.graphdef,
            model.params,
            dtype=model.dtype,
            donate=True,
            mesh=place.mesh,
            rules=place.rules,
        )
        jax.block_until_ready(params)
        say(
            f"loaded {folder} in {time.perf_counter() - begun:.1f} s: {model.dtype.name} on "
            f"{jax.devices()[0].device_kind}, attention {place.prefill}, in decoding {place.decode}"
        )
        return cls(config=model.config, graphdef=graphdef, params=params, place=place)

    def engine(
        self,
        shapes: engine.Shapes,
        *,
        chunk_tokens: int,
        num_slots: int | None,
        say: Callable[[str], None],
    ) -> engine.Engine:
        """Return the sampler of this policy; see `Engine`."""
        return engine.Engine(
            graphdef=self.graphdef,
            config=self.config,
            shapes=shapes,
            prefill_implementation=self.place.prefill,
            decode_implementation=self.place.decode,
            chunk_tokens=chunk_tokens,
            num_slots=num_slots,
            mesh=self.place.mesh,
            rules=self.place.rules,
            say=say,
        )
