"""A stage's compiled programs with abstract arguments, to be compiled ahead of time or counted.

Each stage lists its own in `stages/STAGE/programs.py`, made by the functions that the stage itself
runs; no array is made. `commands.plan` reads them.
"""

import dataclasses
import functools
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
from prism_jax.training import train_state

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a program computes in a step, over all devices, for an estimate of its time."""

    model: Qwen3VLConfig
    tokens: int  # that go through the layers in a call; of decoding: rows of a token
    sequence_tokens: int  # that a token attends to at most
    patches: int
    head_tokens: int  # that go through the output head; 0: none
    calls: int  # in a step
    has_gradient: bool
    is_decoding: bool  # every call reads all weights and caches
    remat: str = "none"  # of the layers, where there is a gradient
    head_chunk_tokens: int = 0  # of a part, that go through the head at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A jitted program of a stage, and what lies on the devices while it runs."""

    phase: str  # what the user calls it: "update", "scores", "prefill", …
    function: Any  # jitted
    arguments: tuple
    static: Mapping[str, Any]  # keyword arguments, static
    # Named parts of the arguments, each a tree of abstract arrays.
    parts: Mapping[str, Tree]
    # What lies on the devices besides, for the stage's other programs.
    beside: Mapping[str, Tree]
    work: Work
    made: Tree = None  # large outputs that take no argument's place

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
        """Return the bounds for pictures of at most so many pixels."""
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
    build, graphdef, params = _abstract(config, anywhere, is_discriminator=is_discriminator)
    return setup_models.Model(
        config=config,
        values={},
        graphdef=graphdef,
        params=params,
        build=build,
        source=source,
        is_discriminator=is_discriminator,
    )


@functools.cache
def _abstract(
    config: Qwen3VLConfig, devices: devices_lib.Devices, *, is_discriminator: bool
) -> tuple[train_state.MakeModel, nnx.GraphDef, nnx.State]:
    build = setup_models.builder(config, devices, is_discriminator=is_discriminator)
    return build, *train_state.abstract_params(build, param_dtype=devices.param_dtype)


def key() -> jax.ShapeDtypeStruct:
    """Return an abstract random key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def example(num_tokens: int = 8) -> Example:
    """Return a sequence without pictures, of which packers make rows of any static shape."""
    tokens = np.full(num_tokens, positions.TEXT, np.int32)
    return Example(tokens=tokens, token_types=tokens, grids=(), pixels=())


def continuation() -> Continuation:
    """Return what may follow `example`."""
    return Continuation(prompt=0, tokens=np.zeros(1, np.int32))


def one_row(shape: RowShape) -> RowShape:
    """Return the shape with one microbatch of one row; `expand` undoes it."""
    return dataclasses.replace(shape, num_microbatches=1, microbatch_rows=1)


def expand(batch: Tree, devices: devices_lib.Devices, *, num_microbatches: int, rows: int) -> Tree:
    """Return a packed batch of one row as shapes of so many, each with its sharding.

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


def state_parts(state: train_state.TrainState, name: str = "") -> dict[str, Tree]:
    """Return parameters and optimiser states, as they are counted."""
    prefix = f"{name} " if name else ""
    return {f"{prefix}parameters": state.params, f"{prefix}states": state.opt_state}
