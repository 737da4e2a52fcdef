"""A TPU kernel for decoding: a few queries a row against a cache, which is read to its length.

JAX's paged kernels return no log-sum-exp, without which the part that rows share cannot be
merged with the part of each row. This one walks over a row's blocks of places and copies the next
block, or the first of the next row, while it computes.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

_BLOCK = 512  # places; twice a block of keys and values must fit the fast memory
_LANES = 128  # the narrowest row that a TPU writes whole
_LEAST = -1e30  # below every logit, and finite


def _copies(
    row: jax.Array,
    number: jax.Array | int,
    buffer: jax.Array | int,
    *,
    sources: tuple,
    targets: tuple,
    semaphores: Any,
    block: int,
) -> list:
    """Return the copies of a row's block of keys and of values to fast memory."""
    places = pl.ds(number * block, block)
    return [
        pltpu.make_async_copy(
            source.at[row, :, places], target.at[buffer], semaphores.at[which, buffer]
        )
        for which, (source, target) in enumerate(zip(sources, targets, strict=True))
    ]


def _logits(q: jax.Array, k: jax.Array) -> jax.Array:
    """Return float32[T, places] of one head."""
    both_last = (((1,), (1,)), ((), ()))
    logits = jax.lax.dot_general(q, k, both_last, preferred_element_type=jnp.float32)
    return logits / math.sqrt(q.shape[-1])


def _kernel(lengths: Any, following: Any, *refs: Any, block: int, rows_each: int) -> None:
    """Attend for one row of the cache.

    Args:
      following: the next row of the same core that reads anything; -1: none.
    """
    q_ref, k_hbm, v_hbm, out_ref, lse_ref, *scratch = refs
    k_buffer, v_buffer, sums, most, semaphores, turn = scratch
    inner = pl.program_id(1)
    row = pl.program_id(0) * rows_each + inner
    num_heads = q_ref.shape[1]
    num_blocks = pl.cdiv(lengths[row], block)

    copies = functools.partial(
        _copies,
        sources=(k_hbm, v_hbm),
        targets=(k_buffer, v_buffer),
        semaphores=semaphores,
        block=block,
    )

    first = jnp.where(inner == 0, 0, turn[0])
    begin = jnp.where(num_blocks > 0, row, following[row])

    @pl.when((inner == 0) & (begin >= 0))
    def _():
        for copy in copies(begin, 0, 0):
            copy.start()

    out_ref[...] = jnp.zeros_like(out_ref)
    sums[...] = jnp.zeros_like(sums)
    most[...] = jnp.full_like(most, _LEAST)

    def attend_block(number: jax.Array, carry: None) -> None:
        buffer = (first + number) % 2
        is_last = number + 1 == num_blocks
        next_row = jnp.where(is_last, following[row], row)

        @pl.when(next_row >= 0)
        def _():
            for copy in copies(next_row, jnp.where(is_last, 0, number + 1), 1 - buffer):
                copy.start()

        for copy in copies(row, number, buffer):
            copy.wait()
        for head in range(num_heads):
            q = q_ref[0, head]
            logits = _logits(q, k_buffer[buffer, head])
            places = number * block + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            logits = jnp.where(places < lengths[row], logits, _LEAST)
            old = most[head, :, :1]
            new = jnp.maximum(old, logits.max(-1, keepdims=True))
            weights, kept = jnp.exp(logits - new), jnp.exp(old - new)
            values = jnp.dot(
                weights.astype(q.dtype), v_buffer[buffer, head], preferred_element_type=jnp.float32
            )
            out_ref[0, head] = out_ref[0, head] * kept + values
            total = sums[head, :, :1] * kept + weights.sum(-1, keepdims=True)
            sums[head] = jnp.broadcast_to(total, sums.shape[1:])
            most[head] = jnp.broadcast_to(new, most.shape[1:])
        return carry

    jax.lax.fori_loop(0, num_blocks, attend_block, None)
    turn[0] = (first + num_blocks) % 2
    out_ref[0] = out_ref[0] / jnp.where(num_blocks > 0, sums[:, :, :1], 1)
    lse_ref[0] = most[...] + jnp.log(sums[...])


def part(
    q: Float[Array, "B K T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    lengths: Int[Array, "B"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B K T H"], Float[Array, "B K T"]]:
    """Attend from T queries a kv head to the first `lengths` places of each row.

    A row of length 0 reads nothing; its log-sum-exp is minus infinity.

    Args:
      interpret: run the kernel anywhere, slowly.

    Raises:
      NotImplementedError: the places of a row are no multiple of 128.
    """
    rows, heads, queries, head_dim = q.shape
    if k.shape[2] % _LANES:
        raise NotImplementedError(f"pallas decoding needs a multiple of 128, got {k.shape[2]}")
    block = math.gcd(k.shape[2], _BLOCK)
    # A chip with two cores gives each a half of the rows.
    rows_each = rows // 2 if rows % 2 == 0 else rows
    grid = (rows // rows_each, rows_each)

    def of_row(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, *shape), lambda outer, inner, *_: (outer * rows_each + inner, 0, 0, 0)
        )

    # Not just anywhere: the compiler would bring a small cache to fast memory as a whole, and once
    # the new places are written there, copy all of it back.
    whole = pl.BlockSpec(memory_space=pltpu.HBM)
    if not interpret:
        k, v = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k, v))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, block=block, rows_each=rows_each),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[of_row(heads, queries, head_dim), whole, whole],
            out_specs=[of_row(heads, queries, head_dim), of_row(heads, queries, _LANES)],
            scratch_shapes=[
                pltpu.VMEM((2, heads, block, head_dim), k.dtype),
                pltpu.VMEM((2, heads, block, head_dim), v.dtype),
                pltpu.VMEM((heads, queries, _LANES), jnp.float32),
                pltpu.VMEM((heads, queries, _LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            jax.ShapeDtypeStruct((rows, heads, queries, _LANES), jnp.float32),
        ],
        # Of full rows: the actual reads depend on lengths that the compiler does not know.
        cost_estimate=pl.CostEstimate(
            flops=4 * queries * k.size,
            bytes_accessed=2 * k.size * k.dtype.itemsize + 2 * q.size * q.dtype.itemsize,
            transcendentals=queries * k.size // head_dim,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(lengths, _following(lengths, rows_each), q, k, v)
    return out, lse[..., 0]


def _following(lengths: jax.Array, rows_each: int) -> jax.Array:
    """Return the next row of the same core whose length is not 0, -1 for none, of each row."""
    none = jnp.iinfo(jnp.int32).max
    rows = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    used = jnp.where(lengths > 0, rows, none).reshape(-1, rows_each)
    later = jnp.pad(used[:, 1:], ((0, 0), (0, 1)), constant_values=none)
    nearest = jax.lax.cummin(later, axis=1, reverse=True).reshape(-1)
    return jnp.where(nearest == none, -1, nearest)
