"""The sampler's programs with abstract arguments; see `setup.programs`."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models import inputs, sharding
from models import text as text_lib
from prism_jax import configuration
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import rollouts
from prism_jax.policy import update as policy_update
from prism_jax.rollout import decode, serving
from prism_jax.rollout.sampling import Sampling
from prism_jax.rows import RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import programs
from prism_jax.training import train_state

Tree = Any
# Of the chat template; which they are changes no shape.
_END_TOKENS = (0, 1)


def prepared(
    model: setup_models.Model, devices: devices_lib.Devices
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return what `rollout.serving.prepare` makes of a model, as shapes with their shardings."""

    def place(param: nnx.Variable) -> nnx.Variable:
        spec = sharding.spec(devices.rules, *param.get_metadata("axes"))
        where = NamedSharding(devices.mesh, spec)
        return param.replace(jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=where))

    def placed(params: nnx.State) -> nnx.State:
        return jax.tree.map(place, params, is_leaf=lambda x: isinstance(x, nnx.Variable))

    stacked = placed(model.params)["text"]["layers"]["attn"]
    q, k = (stacked[name]["kernel"].get_value() for name in ("q", "k"))

    heads = serving.is_cut_between_heads(q, k, model.config.text.num_kv_heads)
    graphdef, params = _joined(model.build, heads, devices.dtype)
    return graphdef, placed(params)


@functools.cache
def _joined(
    build: train_state.MakeModel, heads: bool, dtype: jnp.dtype
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the model with its layers apart, the maps of the same input joined."""

    def joined(rngs: nnx.Rngs) -> nnx.Module:
        built = build(rngs)
        built.text.unstack()
        built.text.join(heads=heads)
        return built

    return train_state.abstract_params(joined, param_dtype=dtype)


def sampler(
    options: rollouts.Rollout,
    model: setup_models.Model,
    devices: devices_lib.Devices,
    bounds: programs.Bounds,
    *,
    beside: Mapping[str, Tree],
    num_generations: int = 1,
) -> list[programs.Program]:
    """Return prefill and decoding of a batch of prompts.

    Args:
      beside: the states of training, which stay where they are.
      num_generations: of `options.num_prompts` prompts in a step.
    """
    parts = devices.row_parts()
    prompts = -(-options.batch_prompts(devices) // parts) * parts
    num_batches = num_generations * -(-options.num_prompts // prompts)
    rows = prompts * options.num_responses
    layout = devices.layout()
    length = -(-bounds.prompt_tokens // layout.token_multiple) * layout.token_multiple
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        max_tokens=options.max_response_tokens,
        end_token_ids=_END_TOKENS,
    )
    graphdef, params = prepared(model, devices)
    text, vision = _prompts(model, devices, bounds, num_prompts=prompts, row_tokens=length)
    keys = programs.placed(devices, (rows,), programs.key().dtype, "batch")
    started = {
        "sampling": sampling,
        "num_responses": options.num_responses,
        "implementation": devices.attention,
        "cache_tokens": length + options.max_response_tokens,
    }
    state = _state(model, devices, rows=rows, places=started["cache_tokens"], sampling=sampling)
    shared = {"beside": beside, "parts": {"sampler's weights": params}}
    prefill, decoding = _works(
        model, bounds, options, prompts=prompts, length=length, num_batches=num_batches
    )
    return [
        programs.Program(
            phase="prefill",
            function=decode.start,
            arguments=(graphdef, params, text, vision, keys),
            static=started,
            work=prefill,
            made=state,
            **shared,
        ),
        programs.Program(
            phase="decode",
            function=decode.advance("tpu" if devices.attention == "splash" else "gpu"),
            arguments=(graphdef, params, state),
            static={
                "sampling": sampling,
                "implementation": devices.decode_attention,
                "chunk_tokens": options.chunk_tokens,
            },
            work=decoding,
            **shared | {"parts": shared["parts"] | {"caches": state}},
        ),
    ]


def _works(
    model: setup_models.Model,
    bounds: programs.Bounds,
    options: rollouts.Rollout,
    *,
    prompts: int,
    length: int,
    num_batches: int,
) -> tuple[programs.Work, programs.Work]:
    """Return what prefill and decoding compute."""
    prefill = programs.Work(
        model=model.config,
        tokens=prompts * length,
        sequence_tokens=length,
        patches=prompts * bounds.prompt_patches,
        head_tokens=0,
        calls=num_batches,
        has_gradient=False,
        is_decoding=False,
    )
    decoding = dataclasses.replace(
        prefill,
        tokens=prompts * options.num_responses,
        sequence_tokens=length + options.max_response_tokens,
        patches=0,
        head_tokens=prompts * options.num_responses,
        calls=num_batches * options.max_response_tokens,
        is_decoding=True,
    )
    return prefill, decoding


def rows(
    model: setup_models.Model, devices: devices_lib.Devices, shape: RowShape
) -> policy_batch.PolicyBatch:
    """Return the abstract rows of an update."""
    batch = policy_batch.pack(
        [programs.example()],
        [programs.continuation()],
        [np.zeros(1, np.float32)],
        np.zeros(1, np.float32),
        programs.one_row(shape),
        model.config,
    )
    return programs.expand(
        batch, devices, num_microbatches=shape.num_microbatches, rows=shape.microbatch_rows
    )


def update_work(
    model: setup_models.Model,
    shape: RowShape,
    train: policy_update.Train,
    source: configuration.Model,
    *,
    calls: int,
) -> programs.Work:
    """Return what an update computes, `calls` times all microbatches."""
    return programs.Work(
        model=model.config,
        tokens=shape.microbatch_rows * shape.row_tokens,
        sequence_tokens=shape.row_tokens,
        patches=shape.microbatch_rows * shape.row_patches,
        head_tokens=shape.microbatch_rows * shape.row_continued_tokens,
        head_chunk_tokens=train.head_chunk_tokens,
        calls=shape.num_microbatches * calls,
        has_gradient=True,
        is_decoding=False,
        remat=source.remat,
    )


def _state(
    model: setup_models.Model,
    devices: devices_lib.Devices,
    *,
    rows: int,
    places: int,
    sampling: Sampling,
) -> decode.DecodeState:
    """Return the responses while they are decoded; rows lie over the parts, heads over tensor."""
    config = model.config.text

    def each(dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
        return programs.placed(devices, (rows, *more), dtype, "batch", *[None] * len(more))

    keys = programs.placed(
        devices,
        (rows, places, config.num_kv_heads, config.head_dim),
        devices.dtype,
        *("batch", None, "act_kv_heads", None),
    )
    layers = [keys] * config.num_layers
    counts = each(np.int32)
    return decode.DecodeState(
        cache=text_lib.Cache(keys=layers, values=layers, lengths=counts, next_positions=counts),
        hidden=each(devices.dtype, config.hidden_size),
        tokens=each(np.int32, sampling.max_tokens),
        logprobs=each(np.float32, sampling.max_tokens),
        lengths=counts,
        is_ended=each(np.bool_),
        keys=each(programs.key().dtype),
        step=programs.placed(devices, (), np.int32),
    )


def _prompts(
    model: setup_models.Model,
    devices: devices_lib.Devices,
    bounds: programs.Bounds,
    *,
    num_prompts: int,
    row_tokens: int,
) -> tuple[inputs.TextInput, inputs.VisionInput | None]:
    """Return prompts as the sampler reads them: one a row, the images of a part side by side."""
    parts, rules = devices.row_parts(), devices.rules
    layout = devices.layout()
    text = inputs.pack_text(
        [[programs.example()]],
        config=model.config,
        row_tokens=row_tokens,
        max_segments=2,
        num_vision_rows=1,
    )

    def rows(count: int, axis: int):
        spec = PartitionSpec(*[None] * axis, rules.mesh_axes("batch"))

        def one(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
            shape = (*leaf.shape[:axis], count, *leaf.shape[axis + 1 :])
            where = NamedSharding(devices.mesh, spec)
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=where)

        return one

    places = rows(num_prompts, 1)(text.positions)
    text = jax.tree.map(rows(num_prompts, 0), text)
    text = dataclasses.replace(text, positions=places)
    if model.config.vision is None or not bounds.prompt_patches:
        return text, None
    each = num_prompts // parts
    multiple = layout.token_multiple
    patches = -(-each * bounds.prompt_patches // multiple) * multiple
    vision = empty_vision(model, row_patches=patches, row_images=each * bounds.prompt_images)
    return text, jax.tree.map(rows(parts, 0), vision)


def empty_vision(
    model: setup_models.Model, *, row_patches: int, row_images: int
) -> inputs.VisionInput:
    """Return one vision row of padding."""
    return inputs.VisionInput(
        pixels=np.zeros((1, row_patches, model.config.vision.patch_dim), np.uint8),
        coords=np.zeros((1, row_patches, 2), np.int32),
        corners=np.zeros((1, row_patches, 4), np.int32),
        corner_weights=np.zeros((1, row_patches, 4), np.float32),
        segments=inputs.pack_segments([[]], row_length=row_patches, max_segments=row_images + 1),
    )
