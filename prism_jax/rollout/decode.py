"""Prefill and token-by-token decoding under jit."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import attention
from models.inputs import TextInput, VisionInput
from prism_jax.rollout import sampling as sampling_lib
from prism_jax.rollout.sampling import Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """Hold the responses so far; every buffer is donated from chunk to chunk."""

    cache: Any  # models.text.Cache
    hidden: Any  # [B, D]  from which the next token is drawn
    tokens: Any  # int32[B, max_tokens]
    logprobs: Any  # float32[B, max_tokens]
    lengths: Any  # int32[B]  tokens drawn, the end token included
    is_ended: Any  # bool[B]  an end token was drawn
    keys: Any  # key[B]
    step: Any  # int32[]


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "sampling", "num_responses", "implementation", "cache_tokens"),
)
def start(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    text: TextInput,
    vision: VisionInput | None,
    keys: jax.Array,
    *,
    sampling: Sampling,
    num_responses: int,
    implementation: attention.Implementation,
    cache_tokens: int,
) -> DecodeState:
    """Read each prompt once and make room for `num_responses` responses to it.

    Args:
      keys: one for each response, those of a prompt side by side.
    """
    model = nnx.merge(graphdef, params)
    images = None
    if vision is not None:
        images = model.encode_images(vision, implementation=implementation, remat=False)
    hidden, cache = model.prefill(
        text, images, implementation=implementation, cache_length=cache_tokens
    )
    hidden, cache = jax.tree.map(lambda x: jnp.repeat(x, num_responses, axis=0), (hidden, cache))
    rows = hidden.shape[0]
    return DecodeState(
        cache=cache,
        hidden=hidden,
        tokens=jnp.zeros((rows, sampling.max_tokens), jnp.int32),
        logprobs=jnp.zeros((rows, sampling.max_tokens), jnp.float32),
        lengths=jnp.zeros(rows, jnp.int32),
        is_ended=jnp.zeros(rows, bool),
        keys=keys,
        step=jnp.int32(0),
    )


def step(
    model: nnx.Module,
    state: DecodeState,
    *,
    sampling: Sampling,
    implementation: attention.Implementation,
) -> DecodeState:
    """Draw one more token of each response that has not ended, and read it."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.step)
    tokens, logprobs = sampling_lib.draw(model.logits(state.hidden), keys, sampling)
    is_open = ~state.is_ended

    def written(buffer: jax.Array, new: jax.Array) -> jax.Array:
        # Places behind an ended response keep token 0 and log-probability 0.
        column = jnp.where(is_open, new, 0)[:, None]
        return jax.lax.dynamic_update_slice_in_dim(buffer, column, state.step, axis=1)

    hidden, cache = model.decode_step(tokens, state.cache, implementation=implementation)
    # An ended row stays where it is: its cache must not grow.
    lengths = jnp.where(is_open, cache.lengths, state.cache.lengths)
    ends = jnp.asarray(sampling.end_token_ids, jnp.int32)
    return DecodeState(
        cache=dataclasses.replace(cache, lengths=lengths),
        hidden=hidden,
        tokens=written(state.tokens, tokens),
        logprobs=written(state.logprobs, logprobs),
        lengths=state.lengths + is_open,
        is_ended=state.is_ended | jnp.isin(tokens, ends),
        keys=state.keys,
        step=state.step + 1,
    )


def _advance(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: DecodeState,
    *,
    sampling: Sampling,
    implementation: attention.Implementation,
    chunk_tokens: int,
) -> DecodeState:
    """Decode up to `chunk_tokens` more tokens, or until every response has ended."""
    model = nnx.merge(graphdef, params)
    one = functools.partial(step, model, sampling=sampling, implementation=implementation)
    stop = jnp.minimum(state.step + chunk_tokens, sampling.max_tokens)

    def is_running(state: DecodeState) -> jax.Array:
        return (state.step < stop) & ~state.is_ended.all()

    return jax.lax.while_loop(is_running, one, state)


def compiler_options(platform: str) -> dict[str, bool]:
    """Return how decoding is compiled for a platform.

    On NVIDIA GPUs the thin matrix products of decoding run faster without Triton.
    """
    return {"xla_gpu_enable_triton_gemm": False} if platform == "gpu" else {}


@functools.cache
def advance(platform: str):
    """Return the jitted decoding of one chunk for a platform; it consumes its state."""
    return jax.jit(
        _advance,
        static_argnames=("graphdef", "sampling", "implementation", "chunk_tokens"),
        donate_argnames="state",
        compiler_options=compiler_options(platform),
    )
