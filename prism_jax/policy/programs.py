"""The policy's programs with abstract arguments; see `setup.programs`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models import inputs
from models.config import Qwen3VLConfig
from prism_jax import configuration
from prism_jax import mesh as mesh_lib
from prism_jax.data import encode
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import distill, rollouts
from prism_jax.policy import teaching as teaching_lib
from prism_jax.policy import update as policy_update
from prism_jax.rollout import decode, engine, layout, memory, prefill, serving
from prism_jax.rollout.sampling import Mode, Settings
from prism_jax.rows import RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import programs
from prism_jax.training import train_state, train_step

Tree = Any
# Of the chat template; the numbers themselves change no shape.
_END_TOKENS = (0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rollouts:
    """The sampler as it is laid out beside the states of training."""

    engine: engine.Engine
    devices: devices_lib.Devices  # with the sampler's mesh
    params: nnx.State
    work: memory.Work
    plan: memory.Plan
    prefill_shape: prefill.Shape  # of the largest call


def sampler(
    options: rollouts.Rollout,
    model: setup_models.Model,
    devices: devices_lib.Devices,
    bounds: programs.Bounds,
    *,
    beside: Mapping[str, Tree],
    num_generations: int = 1,
) -> list[programs.Program]:
    """Return prefill and decoding, on the sampler's mesh, with the slots that memory holds.

    Args:
      beside: the states of training, which stay where they are.
      num_generations: of `options.num_prompts` prompts in a step.
    """
    laid = _lay_out(options, model, devices, bounds, beside=beside)
    state = _state(laid)
    reading, decoding = _works(laid, num_generations=num_generations)
    shared = {
        "devices": laid.devices,
        "beside": beside,
        "parts": {"sampler's weights": laid.params, "caches": state},
        "is_fitted": True,
        "note": laid.plan.line(),
    }
    key = jax.random.key(0)
    program = decode.Program(
        mode=Mode.of([options.sampling(ends=_END_TOKENS)]),
        layout=laid.plan.layout(),
        implementation=laid.engine.decode_implementation,
        chunk_tokens=laid.engine.chunk_tokens,
        key_impl=str(jax.random.key_impl(key)),
        rules=devices.rules,
    )
    return [
        programs.Program(
            phase="prefill",
            function=prefill.fill,
            arguments=(laid.engine.graphdef, laid.params, state, _prompts(laid)),
            static={
                "implementation": laid.engine.prefill_implementation,
                "rules": devices.rules,
            },
            work=reading,
            **shared,
        ),
        programs.Program(
            phase="decode",
            function=decode.advance(laid.engine.graphdef, program, devices.platform),
            arguments=(laid.params, state, _control(laid, np.asarray(jax.random.key_data(key)))),
            static={},
            work=decoding,
            **shared,
        ),
    ]


def _lay_out(
    options: rollouts.Rollout,
    model: setup_models.Model,
    devices: devices_lib.Devices,
    bounds: programs.Bounds,
    *,
    beside: Mapping[str, Tree],
) -> _Rollouts:
    """Return mesh, weights and slots, as `rollouts.Sampler` chooses them."""
    size = encode.Size(
        tokens=bounds.prompt_tokens, patches=bounds.prompt_patches, images=bounds.prompt_images
    )
    _, params = programs.plain_policy(model.config, devices)
    opened = rollouts.open_engine(options, model, devices, [size])
    free = devices.described.memory_bytes - sum(
        programs.num_bytes(tree) for tree in beside.values()
    )
    tensor = options.tensor or layout.tensor_for(
        params,
        model.config,
        num_devices=devices.mesh.size,
        dtype=devices.dtype,
        free_bytes=free,
    )
    mesh = layout.mesh(devices.mesh, tensor=tensor)
    graphdef, params = _unstacked(
        model.config,
        dataclasses.replace(devices, mesh=None),
        heads=serving.is_cut_between_heads(mesh, devices.rules, model.config.text.num_kv_heads),
    )
    params = serving.placed(params, dtype=devices.dtype, mesh=mesh, rules=devices.rules)
    opened = dataclasses.replace(opened, graphdef=graphdef, mesh=mesh)
    work = opened.work(
        num_prompts=options.num_prompts,
        num_responses=options.num_responses,
        largest=(bounds.prompt_tokens, bounds.prompt_patches, bounds.prompt_images),
        max_tokens=options.max_response_tokens,
    )
    limits = opened.limits(free_bytes=free - programs.num_bytes(params), dtype=devices.dtype)
    try:
        plan = memory.make(model.config, work, limits)
    except ValueError:
        # Not even one slot a part fits, as the figures for that one will show.
        least = dataclasses.replace(limits, free_bytes=None, num_slots=limits.num_parts)
        plan = memory.make(model.config, work, least)
    shape = prefill.shape(
        tokens=work.prompt_tokens,
        patches=work.prompt_patches,
        frames=work.prompt_images,
        implementation=opened.prefill_implementation,
    )
    return _Rollouts(
        engine=opened,
        devices=dataclasses.replace(devices, mesh=mesh),
        params=params,
        work=work,
        plan=plan,
        prefill_shape=shape.times(plan.prefill_prompts),
    )


@functools.cache
def _unstacked(
    config: Qwen3VLConfig, devices: devices_lib.Devices, *, heads: bool
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the weights for decoding, not yet placed; see `serving.unstacked`."""
    graphdef, params = programs.plain_policy(config, devices)
    return serving.unstacked(
        graphdef, params, join=serving.joins_maps(devices.platform), heads=heads
    )


def _state(laid: _Rollouts) -> decode.State:
    """Return the empty slots, as `rollout.device.Device.empty` makes them."""
    text, devices = laid.engine.config.text, laid.devices
    shapes = decode.abstract_state(text, laid.plan, devices.dtype)
    specs = decode.specs(devices.rules, text.num_layers)

    def place(spec: PartitionSpec, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(devices.mesh, spec))

    return jax.tree.map(place, specs, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _control(laid: _Rollouts, key_data: np.ndarray) -> decode.Control:
    """Return the host's part of a chunk, as `rollout.session.Session` makes it."""
    plan = laid.plan
    slots, entries = plan.num_parts * plan.num_slots, plan.num_parts * plan.num_prompts
    each = functools.partial(_rows, laid, slots)
    return decode.Control(
        is_open=each(np.bool_),
        is_fresh=each(np.bool_),
        prompt=each(np.int32),
        place=each(np.int32),
        starts=each(np.int32),
        limits=each(np.int32),
        ends=each(np.int32, len(_END_TOKENS)),
        keys=each(key_data.dtype, *key_data.shape),
        numbers=each(np.uint32),
        settings=Settings(
            temperature=each(np.float32), top_k=each(np.int32), top_p=each(np.float32)
        ),
        prompt_lengths=_rows(laid, entries, np.int32),
        readers=_rows(laid, entries, np.int32, plan.width),
    )


def _rows(laid: _Rollouts, count: int, dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
    return programs.placed(laid.devices, (count, *more), dtype, "batch", *[None] * len(more))


def _prompts(laid: _Rollouts) -> prefill.Rows:
    """Return the prompts of the largest call, one row a part."""
    parts, devices, shape = laid.plan.num_parts, laid.devices, laid.prefill_shape
    config = laid.engine.config
    rows = prefill.pack_prompts(
        [[(0, programs.example())]], shape, config=config, num_entries=laid.plan.num_prompts
    )
    vision = None
    if config.vision is not None:
        vision = _empty_vision(laid)

    def expand(axis: int) -> Callable[[np.ndarray], jax.ShapeDtypeStruct]:
        spec = PartitionSpec(*[None] * axis, devices.rules.mesh_axes("batch"))

        def one(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
            sizes = (*leaf.shape[:axis], parts, *leaf.shape[axis + 1 :])
            where = NamedSharding(devices.mesh, spec)
            return jax.ShapeDtypeStruct(sizes, leaf.dtype, sharding=where)

        return one

    places = expand(1)(rows.text.positions)
    text = jax.tree.map(expand(0), rows.text)
    return prefill.Rows(
        text=dataclasses.replace(text, positions=places),
        vision=jax.tree.map(expand(0), vision),
        spans=jax.tree.map(expand(0), rows.spans),
    )


def _empty_vision(laid: _Rollouts) -> inputs.VisionInput:
    """Return one vision row of padding."""
    vision, shape = laid.engine.config.vision, laid.prefill_shape
    sizes = (1, shape.patches)
    return inputs.VisionInput(
        pixels=np.zeros((*sizes, vision.patch_dim), np.uint8),
        coords=np.zeros((*sizes, 2), np.int32),
        corners=np.zeros((*sizes, 4), np.int32),
        corner_weights=np.zeros((*sizes, 4), np.float32),
        segments=inputs.pack_segments(
            [[]], row_length=shape.patches, max_segments=shape.frames + 1
        ),
    )


def _works(laid: _Rollouts, *, num_generations: int) -> tuple[programs.Work, programs.Work]:
    """Return the work of prefill and decoding, every response at its longest."""
    plan, work, shape = laid.plan, laid.work, laid.prefill_shape
    slots = plan.num_parts * plan.num_slots
    tokens = plan.num_parts * shape.tokens
    reading = programs.Work(
        model=laid.engine.config,
        tokens=tokens,
        attended_tokens=tokens,
        sequence_tokens=work.prompt_tokens,
        patches=plan.num_parts * shape.patches,
        head_tokens=0,
        calls=num_generations * math.ceil(work.num_groups / plan.num_parts / plan.prefill_prompts),
        has_gradient=False,
        is_decoding=False,
    )
    decoding = dataclasses.replace(
        reading,
        tokens=slots,
        attended_tokens=slots,
        sequence_tokens=work.prompt_tokens + work.response_tokens,
        patches=0,
        head_tokens=slots,
        calls=num_generations * math.ceil(work.num_responses / slots) * work.response_tokens,
        is_decoding=True,
    )
    return reading, decoding


def rows(
    model: setup_models.Model, devices: devices_lib.Devices, shape: RowShape
) -> policy_batch.PolicyBatch:
    """Return the abstract rows of responses whose advantages are still to come."""
    packed = policy_batch.packed_responses(
        [programs.example()],
        [programs.continuation()],
        [np.zeros(1, np.float32)],
        programs.one_row(shape),
        model.config,
    )
    return programs.expand(
        packed.batch, devices, num_microbatches=shape.num_microbatches, rows=shape.microbatch_rows
    )


def with_advantages(batch: policy_batch.PolicyBatch) -> policy_batch.PolicyBatch:
    """Return the rows with advantages, the form of an update."""
    return dataclasses.replace(batch, advantages=batch.sampler_logprobs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taught:
    """The open teacher of a plan, or none."""

    teacher: distill.Teacher | None  # abstract

    @property
    def note(self) -> str:
        """Return a line for the user."""
        return "" if self.teacher is None else "the time leaves out the teacher's forward pass"

    @property
    def beside(self) -> dict[str, Tree]:
        """Return its arrays, which stay on the devices."""
        return {} if self.teacher is None else {"teacher": self.teacher.params}

    def batch(self, rows: policy_batch.PolicyBatch) -> Any:
        """Return the batch of an update."""
        if self.teacher is None:
            return rows
        coefficient = jax.ShapeDtypeStruct((), np.float32)
        lesson = teaching_lib.Lesson(params=self.teacher.params, coefficient=coefficient)
        return train_step.WithShared(rows=rows, shared=lesson)


def taught(teacher: setup_models.Model | None, devices: devices_lib.Devices) -> Taught:
    """Return the open teacher of a plan."""
    if teacher is None:
        return Taught(teacher=None)
    places = mesh_lib.param_shardings(teacher.params, devices.mesh, devices.rules)
    params = train_state.with_shardings(teacher.params, places)
    return Taught(teacher=distill.Teacher(graphdef=teacher.graphdef, params=params, fingerprint=""))


def update_work(
    model: setup_models.Model,
    shape: RowShape,
    train: policy_update.Train,
    source: configuration.Model,
    *,
    calls: int,
) -> programs.Work:
    """Return the work of an update, `calls` times all microbatches."""
    return programs.Work(
        model=model.config,
        **programs.tokens_of(shape),
        sequence_tokens=shape.row_tokens,
        patches=shape.microbatch_rows * shape.row_patches,
        head_tokens=shape.microbatch_rows * shape.row_continued_tokens,
        head_chunk_tokens=train.head_chunk_tokens,
        calls=shape.num_microbatches * calls,
        has_gradient=True,
        is_decoding=False,
        remat=source.remat,
    )
