"""Attention over packed rows; one explicit implementation. Decoding's is `decode_attention`.

  implementation  where               how
  "xla"           everywhere          masked softmax
  "splash"        TPU                 Pallas splash attention
  "cudnn"         NVIDIA, bf16/fp16   cuDNN, one segment list a row

An implementation raises for anything that it cannot do; none falls back to another.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jaxtyping import Array, Float

from models import sharding
from models.inputs import Segments

Implementation = Literal["xla", "splash", "cudnn"]

_BLOCK = 512  # queries at a time where all of them would need too much memory
_SPLASH_BLOCK = 1024  # larger ones do not fit the fast memory of a v5e


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Segments,
    *,
    causal: bool,
    implementation: Implementation,
    rules: sharding.Rules,
    row_axis: str,
) -> Float[Array, "B T N H"]:
    """Attend inside each segment of each row; query head n reads kv head n // (N / K).

      causal, ids 1 1 2 2 0      full, ids 1 1 2 2 0
            k 1 1 2 2 0                k 1 1 2 2 0
        q 1   x . . . .            q 1   x x . . .
          1   x x . . .              1   x x . . .
          2   . . x . .              2   . . x x .
          2   . . x x .              2   . . x x .
          0   . . . . .              0   . . . . .

    Padding, id 0, gets zeros and gives no gradient; a kernel may leave its places unwritten.

    Args:
      row_axis: logical axis of the rows, "batch" for text and "images" for patches.
    """
    if implementation == "xla":
        return _without_padding(_xla(q, k, v, segments.ids, causal=causal), segments)
    if implementation == "splash":
        run = functools.partial(splash, causal=causal, interpret=False)
        return _without_padding(_per_shard(run, rules, row_axis, q, k, v, segments), segments)
    if implementation == "cudnn":
        # Loaded here: it rests on private modules of JAX.
        cudnn = importlib.import_module("models.cudnn_attention")
        cudnn.check(q)
        run = functools.partial(cudnn.packed, causal=causal)
        # Padding is no segment to cuDNN, which writes neither its results nor its gradients.
        q, k, v = (_without_padding(x, segments) for x in (q, k, v))
        return _without_padding(_per_shard(run, rules, row_axis, q, k, v, segments), segments)
    raise NotImplementedError(f"attention implementation {implementation!r} does not exist")


def _without_padding(x: Float[Array, "B T N H"], segments: Segments) -> Float[Array, "B T N H"]:
    """Return zeros in the padding, whatever stands there, and zeros as its gradient."""
    return jnp.where((segments.ids > 0)[..., None, None], x, 0)


def _masked_softmax(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attend under mask bool[B, T, S]; softmax in float32."""
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[2], n // k.shape[2], h)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits / math.sqrt(h), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, *, causal: bool) -> jax.Array:
    t = ids.shape[1]
    block = math.gcd(t, _BLOCK) if t > 2 * _BLOCK else t
    places = jnp.arange(t)

    @jax.checkpoint
    def attend_block(start: jax.Array) -> jax.Array:
        rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block)
        mask = rows(ids, axis=1)[:, :, None] == ids[:, None, :]
        if causal:
            mask &= (rows(places)[:, None] >= places)[None]
        return _masked_softmax(rows(q, axis=1), k, v, mask)

    if block == t:
        return attend_block(jnp.int32(0))
    out = jax.lax.map(attend_block, jnp.arange(0, t, block))  # [T/block, B, block, N, H]
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, *, causal: bool, interpret: bool
) -> jax.Array:
    """Attend with Pallas splash attention; `interpret` runs the kernel anywhere, slowly.

    Rows must be a multiple of 128 places.
    """
    t, n = q.shape[1:3]
    if t % 128:
        raise NotImplementedError(f"splash attention needs rows of a multiple of 128, got {t}")
    block = math.gcd(t, _SPLASH_BLOCK)
    mask = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask((t, t))] * n),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=min(block, 512),
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=min(block, 512),
            use_fused_bwd_kernel=True,
        ),
        interpret=interpret,
        residual_checkpoint_name="attention",
    )
    heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    q = heads_first(q / math.sqrt(q.shape[-1])).astype(q.dtype)
    ids = splash_attention_kernel.SegmentIds(segments.ids, segments.ids)
    return heads_first(jax.vmap(kernel)(q, heads_first(k), heads_first(v), ids))


def _per_shard(
    run: Callable,
    rules: sharding.Rules,
    row_axis: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
) -> jax.Array:
    """Run a kernel on each device's rows and heads; it cannot be partitioned by the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q, k, v, segments)
    heads = sharding.spec(rules, row_axis, "act_length", "act_heads", None)
    kv_heads = sharding.spec(rules, row_axis, "act_length", "act_kv_heads", None)
    rows = sharding.spec(rules, row_axis, "act_length")
    if heads[1] is not None:
        raise NotImplementedError("attention kernels need whole rows: act_length must be None")
    return jax.shard_map(
        run,
        in_specs=(heads, kv_heads, kv_heads, Segments(ids=rows, lengths=rows, offsets=rows)),
        out_specs=heads,
        check_vma=False,
    )(q, k, v, segments)
