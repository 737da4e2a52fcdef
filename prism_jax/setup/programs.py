"""A stage's compiled programs with abstract arguments, to be compiled ahead of time or counted.

Each stage lists its own in `stages/STAGE/programs.py`, made by the functions that the stage itself
runs; no array is made. `commands.plan` reads them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models import positions
from models.config import Qwen3VLConfig
from models.inputs import Example
from prism_jax import batches, configuration
from prism_jax.rows import Continuation, RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.training import optim, train_state

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The work of a program in a step, over all devices, for estimates of time and memory."""

    model: Qwen3VLConfig
    tokens: int  # that go through the layers in a call; of decoding: rows of a token
    # That attention reads in a call: more than `tokens` where prompts stand once in a row.
    attended_tokens: int
    sequence_tokens: int  # that a token attends to at most
    patches: int
    head_tokens: int  # that go through the output head; 0: none
    calls: int  # in a step
    has_gradient: bool
    is_decoding: bool  # every call reads all weights and caches
    remat: str = "none"  # of the layers, where there is a gradient
    head_chunk_tokens: int = 0  # of a part, that go through the head at a time
    passes: int = 1  # over the same rows in a call, whose activations wait for one gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A jitted program of a stage, and the arrays on the devices while it runs."""

    phase: str  # its name for users: "update", "scores", "prefill", …
    devices: devices_lib.Devices  # with the mesh that it runs on
    function: Any  # jitted, or what has its `lower`
    arguments: tuple
    static: Mapping[str, Any]  # keyword arguments, static
    # Named parts of the arguments, each a tree of abstract arrays.
    parts: Mapping[str, Tree]
    # The arrays on the devices besides, of the stage's other programs.
    beside: Mapping[str, Tree]
    work: Work
    gradients: Tree = None  # of what it learns, as parameters; None: it has none
    # Its arrays are made as large as the memory allows, see `rollout.memory`.
    is_fitted: bool = False
    note: str = ""  # a line for the user

    def lower(self) -> jax.stages.Lowered:
        """Return the program, lowered for the devices of its arguments."""
        return self.function.lower(*self.arguments, **self.static)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Sizes that a run learns from its data, and a plan has to assume."""

    prompt_tokens: int  # of the longest prompt, image tokens included
    prompt_patches: int
    prompt_images: int  # one frame of a video counts as one
    teacher_tokens: int  # of the longest segment of a teacher's response

    def within(self, max_pixels: int | None, config: Qwen3VLConfig) -> "Bounds":
        """Return the bounds for pictures of at most `max_pixels` pixels."""
        if config.vision is None:
            return dataclasses.replace(self, prompt_patches=0, prompt_images=0)
        if max_pixels is None:
            return self
        most = self.prompt_images * (max_pixels // config.vision.patch_size**2)
        return dataclasses.replace(self, prompt_patches=min(self.prompt_patches, most))


def open_model(
    config: Qwen3VLConfig,
    source: configuration.Model,
    devices: devices_lib.Devices,
    *,
    is_discriminator: bool,
) -> setup_models.Model:
    """Return a model of these sizes, without any file of it."""
    # Nothing of a model depends on where it will lie.
    anywhere = dataclasses.replace(devices, mesh=None)
    build, graphdef, params = _abstract(
        config, anywhere, source.lora, is_discriminator=is_discriminator
    )
    return setup_models.Model(
        config=config,
        values={},
        graphdef=graphdef,
        params=params,
        build=build,
        source=source,
        is_discriminator=is_discriminator,
    )


def plain_policy(
    config: Qwen3VLConfig, devices: devices_lib.Devices
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return a policy without adapters as the sampler reads it, abstract."""
    anywhere = dataclasses.replace(devices, mesh=None)
    return _abstract(config, anywhere, configuration.NO_LORA, is_discriminator=False)[1:]


@functools.cache
def _abstract(
    config: Qwen3VLConfig,
    devices: devices_lib.Devices,
    lora: configuration.Lora,
    *,
    is_discriminator: bool,
) -> tuple[train_state.MakeModel, nnx.GraphDef, nnx.State]:
    build = setup_models.builder(config, devices, is_discriminator=is_discriminator, lora=lora)
    return build, *train_state.abstract_params(build, param_dtype=devices.param_dtype)


def key() -> jax.ShapeDtypeStruct:
    """Return an abstract random key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def example(num_tokens: int = 8) -> Example:
    """Return a sequence without pictures, of which packers make rows of any static shape."""
    tokens = np.full(num_tokens, positions.TEXT, np.int32)
    return Example(tokens=tokens, token_types=tokens, grids=(), pixels=())


def continuation() -> Continuation:
    """Return the continuation of `example`."""
    return Continuation(prompt=0, tokens=np.zeros(1, np.int32))


def one_row(shape: RowShape) -> RowShape:
    """Return the shape with one microbatch of one row; `expand` undoes it."""
    return dataclasses.replace(shape, num_microbatches=1, microbatch_rows=1, own_rows=None)


def tokens_of(shape: RowShape) -> dict[str, int]:
    """Return the tokens of a microbatch: those in the layers, and those that attention reads."""
    tokens = shape.row_tokens
    if shape.row_prompt_tokens is not None:
        tokens = shape.row_prompt_tokens + shape.row_continued_tokens
    rows = shape.microbatch_rows
    return {"tokens": rows * tokens, "attended_tokens": rows * shape.row_tokens}


def num_bytes(tree: Tree) -> int:
    """Return the bytes of abstract arrays on one device; those in the host's memory are none."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree) if not is_on_host(leaf))


def host_bytes(tree: Tree) -> int:
    """Return the bytes that abstract arrays take in the host's memory for one device."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree) if is_on_host(leaf))


def is_on_host(leaf: jax.ShapeDtypeStruct) -> bool:
    """Return whether an array is kept in the host's memory, see `training.optimizer_step`."""
    return leaf.sharding is not None and leaf.sharding.memory_kind == "pinned_host"


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 0
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def expand(batch: Tree, devices: devices_lib.Devices, *, num_microbatches: int, rows: int) -> Tree:
    """Return a packed batch of one row as shapes of `rows` rows, each with its sharding.

    Args:
      batch: arrays [1, 1, ...], but positions [1, 3, 1, T].
    """
    places = batches.shardings(batch, devices.mesh, devices.rules)

    def one(leaf: np.ndarray, place: NamedSharding) -> jax.ShapeDtypeStruct:
        shape = [num_microbatches, *leaf.shape[1:]]
        shape[len(place.spec) - 1] = rows
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=place)

    return jax.tree.map(one, batch, places)


def placed(
    devices: devices_lib.Devices, shape: tuple[int, ...], dtype: Any, *axes: str | None
) -> jax.ShapeDtypeStruct:
    """Return the shape of an array whose dimensions lie as these logical axes do."""
    spec = PartitionSpec(
        *(None if axis is None else devices.rules.mesh_axes(axis) for axis in axes)
    )
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(devices.mesh, spec))


def trainable(optimizer: optim.Optimizer, state: train_state.TrainState) -> nnx.State:
    """Return the parameters that have gradients."""
    return optimizer.split(state.params)[0]


def state_parts(state: train_state.TrainState, name: str = "") -> dict[str, Tree]:
    """Return parameters and optimiser states, as they are counted."""
    prefix = f"{name} " if name else ""
    return {f"{prefix}parameters": state.params, f"{prefix}states": state.opt_state}
