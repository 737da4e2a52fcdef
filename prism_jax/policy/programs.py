"""The sampler's programs with abstract arguments; see `setup.programs`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models import inputs, sharding
from prism_jax.policy import rollouts
from prism_jax.rollout import decode, serving
from prism_jax.rollout.sampling import Sampling
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

    def joined(rngs: nnx.Rngs) -> nnx.Module:
        built = model.build(rngs)
        built.text.unstack()
        built.text.join(heads=serving.is_cut_between_heads(q, k, model.config.text.num_kv_heads))
        return built

    graphdef, params = train_state.abstract_params(joined, param_dtype=devices.dtype)
    return graphdef, placed(params)


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
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    keys = programs.placed(devices, (rows,), keys.dtype, "batch")
    started = {
        "sampling": sampling,
        "num_responses": options.num_responses,
        "implementation": devices.attention,
        "cache_tokens": length + options.max_response_tokens,
    }
    with jax.sharding.use_abstract_mesh(devices.mesh.abstract_mesh):
        state = jax.eval_shape(
            lambda params, text, vision, keys: decode.start(
                graphdef, params, text, vision, keys, **started
            ),
            *(params, text, vision, keys),
        )
    state = programs.with_sharding(state, lambda leaf: _place(leaf, devices))
    shared = {"beside": beside, "parts": {"sampler's weights": params}}
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
    decoding = programs.Work(
        model=model.config,
        tokens=rows,
        sequence_tokens=length + options.max_response_tokens,
        patches=0,
        head_tokens=rows,
        calls=num_batches * options.max_response_tokens,
        has_gradient=False,
        is_decoding=True,
    )
    return [
        programs.Program(
            phase="prefill",
            function=decode.start,
            arguments=(graphdef, params, text, vision, keys),
            static=started,
            work=prefill,
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


def _place(leaf: jax.ShapeDtypeStruct, devices: devices_lib.Devices) -> NamedSharding:
    """Return where a part of the sampler's state lies: rows over the parts, heads over tensor."""
    axes = ("batch", None, "act_kv_heads", None) if leaf.ndim == 4 else ("batch",)[: leaf.ndim]
    spec = (None if axis is None else devices.rules.mesh_axes(axis) for axis in axes)
    return NamedSharding(devices.mesh, PartitionSpec(*spec))


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
