"""The device's side of decoding: the state of all slots, and a chunk of steps under jit.

A slot draws one response at a time. The host's decisions are in `Control`, passed with each chunk;
the results are in `Chunk`. A slot that the host opens afresh begins behind its prompt, whose keys
and values `prefill` has stored; its old contents need not be erased, as nothing reads beyond a
slot's length.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from models import decode_attention, sharding
from models.cache import Cache, Layout, Prompts
from models.config import TextConfig
from prism_jax.rollout import sampling as sampling_lib
from prism_jax.rollout.memory import Plan

_PROGRAMS: dict[tuple, Any] = {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """The buffers that stay on the device, donated from call to call."""

    keys: Any  # by layer: [blocks, K, places, H]
    values: Any  # by layer: [blocks, K, places, H]
    prompt_keys: Any  # by layer: [prompts x blocks, K, places, H]
    prompt_values: Any  # by layer: [prompts x blocks, K, places, H]
    prompt_hidden: Any  # [prompts, D]  of the last token of each prompt
    hidden: Any  # [B, D]  from which a slot's next token is drawn
    counts: Any  # int32[B]  tokens of the response so far


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """The host's decisions for a chunk. Numbers of slots and prompts are those of a part."""

    is_open: Any  # bool[B]  the slot draws
    is_fresh: Any  # bool[B]  it begins a response
    prompt: Any  # int32[B]
    place: Any  # int32[B]  among the prompt's readers
    starts: Any  # int32[B]  M-RoPE position of the response's first token
    limits: Any  # int32[B]  tokens at which it pauses or ends
    ends: Any  # int32[B, ends]  tokens that end it, -1 for none
    keys: Any  # uint32[B, …]  data of the key
    numbers: Any  # uint32[B]  of the response, folded into the key
    settings: Any  # sampling.Settings
    prompt_lengths: Any  # int32[prompts]
    readers: Any  # int32[prompts, readers]  slots of each prompt, -1 for none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """The results of a chunk of steps, the same on every device."""

    tokens: Any  # int32[B, chunk]
    logprobs: Any  # float32[B, chunk]
    counts: Any  # int32[B]  tokens of the response behind the chunk
    is_ended: Any  # bool[B]  an end token was drawn
    num_steps: Any  # int32[]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The static arguments of a compiled chunk."""

    mode: sampling_lib.Mode
    layout: Layout  # of the slots of a part
    implementation: decode_attention.Implementation
    chunk_tokens: int
    key_impl: str
    rules: sharding.Rules


def specs(rules: sharding.Rules, num_layers: int) -> State:
    """Return how the state lies on the mesh."""
    rows = sharding.spec(rules, "batch")
    layers = [sharding.spec(rules, "batch", "act_kv_heads", None, None)] * num_layers
    return State(
        keys=layers,
        values=layers,
        prompt_keys=layers,
        prompt_values=layers,
        prompt_hidden=rows,
        hidden=rows,
        counts=rows,
    )


def abstract_state(config: TextConfig, plan: Plan, dtype: Any) -> State:
    """Return the shapes of the state, over all parts."""

    def layers(blocks: int, places: int) -> list[jax.ShapeDtypeStruct]:
        shape = (plan.num_parts * blocks, config.num_kv_heads, places, config.head_dim)
        return [jax.ShapeDtypeStruct(shape, dtype)] * config.num_layers

    def hidden(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((plan.num_parts * rows, config.hidden_size), dtype)

    slots = layers(len(plan.layout().rows), plan.block_places)
    prompts = layers(
        plan.num_prompts * plan.prompt_places // plan.prompt_block_places, plan.prompt_block_places
    )
    return State(
        keys=slots,
        values=slots,
        prompt_keys=prompts,
        prompt_values=prompts,
        prompt_hidden=hidden(plan.num_prompts),
        hidden=hidden(plan.num_slots),
        counts=jax.ShapeDtypeStruct((plan.num_parts * plan.num_slots,), jnp.int32),
    )


def per_part(run: Any, in_specs: Any, out_specs: Any) -> Any:
    """Return the function that runs on each device's slots and heads by themselves."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _begin(state: State, control: Control, rules: sharding.Rules) -> tuple[jax.Array, jax.Array]:
    """Return hidden states and counts with those of fresh slots at the end of their prompts."""

    def begin(hidden, prompt_hidden, counts, prompt, is_fresh):
        hidden = jnp.where(is_fresh[:, None], prompt_hidden[prompt], hidden)
        return hidden, jnp.where(is_fresh, 0, counts)

    rows = sharding.spec(rules, "batch")
    return per_part(begin, (rows,) * 5, (rows, rows))(
        state.hidden, state.prompt_hidden, state.counts, control.prompt, control.is_fresh
    )


def _cache(state: State, control: Control, is_running: jax.Array, layout: Layout) -> Cache:
    return Cache(
        keys=state.keys,
        values=state.values,
        layout=layout,
        lengths=state.counts,
        next_positions=control.starts + state.counts,
        is_running=is_running,
        prompts=Prompts(
            keys=state.prompt_keys,
            values=state.prompt_values,
            lengths=control.prompt_lengths,
            readers=control.readers,
            number=control.prompt,
            place=control.place,
        ),
    )


def run_chunk(
    graphdef: nnx.GraphDef, params: nnx.State, state: State, control: Control, *, program: Program
) -> tuple[State, Chunk]:
    """Draw up to `chunk_tokens` tokens of each open slot, until none is running any more."""
    model = nnx.merge(graphdef, params)
    hidden, counts = _begin(state, control, program.rules)
    state = dataclasses.replace(state, hidden=hidden, counts=counts)
    keys = jax.random.wrap_key_data(control.keys, impl=program.key_impl)
    keys = jax.vmap(jax.random.fold_in)(keys, control.numbers)

    def step(loop: tuple) -> tuple:
        state, chunk, is_running = loop
        token_keys = jax.vmap(jax.random.fold_in)(keys, state.counts)
        tokens, logprobs = sampling_lib.draw(
            model.logits(state.hidden), token_keys, control.settings, program.mode
        )

        def written(buffer: jax.Array, new: jax.Array) -> jax.Array:
            column = jnp.where(is_running, new, 0)[:, None]
            return jax.lax.dynamic_update_slice_in_dim(buffer, column, chunk.num_steps, axis=1)

        hidden, cache = model.decode_step(
            tokens,
            _cache(state, control, is_running, program.layout),
            implementation=program.implementation,
        )
        counts = state.counts + is_running
        state = dataclasses.replace(
            state,
            keys=cache.keys,
            values=cache.values,
            # A slot that pauses goes on from here.
            hidden=jnp.where(is_running[:, None], hidden, state.hidden),
            counts=counts,
        )
        is_end = is_running & (tokens[:, None] == control.ends).any(-1)
        chunk = Chunk(
            tokens=written(chunk.tokens, tokens),
            logprobs=written(chunk.logprobs, logprobs),
            counts=counts,
            is_ended=chunk.is_ended | is_end,
            num_steps=chunk.num_steps + 1,
        )
        return state, chunk, is_running & ~is_end & (counts < control.limits)

    def goes_on(loop: tuple) -> jax.Array:
        _, chunk, is_running = loop
        return (chunk.num_steps < program.chunk_tokens) & is_running.any()

    shape = (counts.shape[0], program.chunk_tokens)
    empty = Chunk(
        tokens=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
        counts=counts,
        is_ended=jnp.zeros(shape[:1], bool),
        num_steps=jnp.int32(0),
    )
    is_running = control.is_open & (counts < control.limits)
    state, chunk, _ = jax.lax.while_loop(goes_on, step, (state, empty, is_running))
    if not jax.sharding.get_abstract_mesh().empty:
        chunk = jax.lax.with_sharding_constraint(chunk, PartitionSpec())
    return state, chunk


def compiler_options(platform: str) -> dict[str, bool]:
    """Return how decoding is compiled for a platform.

    On NVIDIA GPUs the thin matrix products of decoding run faster without Triton.
    """
    return {"xla_gpu_enable_triton_gemm": False} if platform == "gpu" else {}


def advance(graphdef: nnx.GraphDef, program: Program, platform: str) -> Any:
    """Return the jitted `run_chunk` of a model, (params, state, control); it consumes its state.

    Ask once a session: to find it takes milliseconds, in which the device would wait.
    """
    key = (graphdef, program, platform)
    if key not in _PROGRAMS:
        _PROGRAMS[key] = jax.jit(
            functools.partial(run_chunk, graphdef, program=program),
            donate_argnums=1,
            compiler_options=compiler_options(platform),
        )
    return _PROGRAMS[key]


def num_programs() -> int:
    """Return how many programs `advance` has compiled."""
    return sum(program._cache_size() for program in _PROGRAMS.values())


@functools.partial(
    jax.jit,
    static_argnames=("layout", "source_class", "target_class", "rules"),
    donate_argnames="state",
)
def move(
    state: State,
    sources: jax.Array,
    targets: jax.Array,
    *,
    layout: Layout,
    source_class: int,
    target_class: int,
    rules: sharding.Rules,
) -> State:
    """Move one response of each part to a slot with room for more places.

    Args:
      sources, targets: int32[parts], slots of each part; source -1 moves none.
    """
    num_blocks = layout.classes[source_class][1]

    def one(state: State, source: jax.Array, target: jax.Array) -> State:
        source, target = source[0], target[0]
        is_moved, source = source >= 0, jnp.maximum(source, 0)
        first = jnp.asarray(layout.first)

        def copied(blocks: jax.Array) -> jax.Array:
            moved, old = (
                jax.lax.dynamic_slice_in_dim(blocks, first[slot], num_blocks)
                for slot in (source, target)
            )
            new = jnp.where(is_moved, moved, old)
            return jax.lax.dynamic_update_slice_in_dim(blocks, new, first[target], axis=0)

        def row(x: jax.Array) -> jax.Array:
            return x.at[target].set(jnp.where(is_moved, x[source], x[target]))

        return dataclasses.replace(
            state,
            keys=[copied(layer) for layer in state.keys],
            values=[copied(layer) for layer in state.values],
            hidden=row(state.hidden),
            counts=row(state.counts),
        )

    of_state = specs(rules, len(state.keys))
    rows = sharding.spec(rules, "batch")
    return per_part(one, (of_state, rows, rows), of_state)(state, sources, targets)
