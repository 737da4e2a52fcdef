"""Attention over packed rows; one explicit implementation. Decoding's is `decode_attention`.

  implementation  where               how
  "xla"           everywhere          masked softmax
  "splash"        TPU                 Pallas splash attention
  "cudnn"         NVIDIA, bf16/fp16   cuDNN, one segment list a row

An implementation raises for anything that it cannot do; none falls back to another.

Where the mesh splits the length of rows (`act_length`), each device keeps its queries and gathers
the keys and values of whole rows, which the backward pass scatters again:

    device 0   queries 0 … T/2      keys and values 0 … T
    device 1   queries T/2 … T      keys and values 0 … T

Both are small beside the rest of a layer where heads are grouped. "cudnn" needs whole rows.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, Literal

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
_SCORES = 512 * 8192  # most scores of a head at a time, where blocks can be made smaller
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

    Raises:
      ValueError: the mesh does not divide the length of the rows.
    """
    length_axes = _length_axes(rules)
    if length_axes and implementation in ("xla", "splash"):
        run = functools.partial(_by_length, implementation=implementation, interpret=False)
        out = run(q, k, v, segments, causal=causal, rules=rules, row_axis=row_axis)
        return _without_padding(out, segments)
    if implementation == "xla":
        return _without_padding(_xla(q, k, v, segments.ids, causal=causal), segments)
    if implementation == "splash":
        run = functools.partial(splash, causal=causal, interpret=False)
        return _without_padding(_per_shard(run, rules, row_axis, q, k, v, segments), segments)
    if implementation == "cudnn":
        if length_axes:
            raise NotImplementedError("cudnn attention needs whole rows: act_length must be None")
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
    return _xla_part(q, k, v, ids, ids, causal=causal, first=0)


def _xla_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_ids: jax.Array,
    ids: jax.Array,
    *,
    causal: bool,
    first: jax.Array | int,
) -> jax.Array:
    """Attend from the queries of the places `first` … of rows, to all of the rows."""
    t, s = q.shape[1], ids.shape[1]
    block = math.gcd(t, _BLOCK) if max(t, s) > 2 * _BLOCK else t
    while block % 2 == 0 and block * s > _SCORES:
        block //= 2
    places = jnp.arange(s)

    @jax.checkpoint
    def attend_block(start: jax.Array) -> jax.Array:
        rows = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block, axis=1
        )
        mask = rows(query_ids)[:, :, None] == ids[:, None, :]
        if causal:
            mask &= ((first + start + jnp.arange(block))[:, None] >= places)[None]
        return _masked_softmax(rows(q), k, v, mask)

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
    kernel = _splash_kernel(q.shape[1], q.shape[2], causal=causal, interpret=interpret, num_parts=1)
    return _run_splash(kernel, q, k, v, segments.ids, segments.ids)


def _splash_kernel(
    t: int, num_heads: int, *, causal: bool, interpret: bool, num_parts: int
) -> splash_attention_kernel.SplashAttentionKernel:
    """Return the kernel of rows of `t` places, the queries of which lie in `num_parts` parts."""
    if t % (128 * num_parts):
        raise NotImplementedError(
            f"splash attention needs rows of a multiple of {128 * num_parts}, got {t}"
        )
    part = t // num_parts
    block = math.gcd(part, _SPLASH_BLOCK)
    if causal:
        mask = splash_attention_mask.CausalMask((t, t))
    else:
        # Equal in all parts; the library fails to split it.
        mask, num_parts = splash_attention_mask.FullMask((part, t)), 1
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * num_heads),
        head_shards=1,
        q_seq_shards=num_parts,
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


def _run_splash(
    kernel: Callable,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_ids: jax.Array,
    ids: jax.Array,
) -> jax.Array:
    heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    q = heads_first(q / math.sqrt(q.shape[-1])).astype(q.dtype)
    both = splash_attention_kernel.SegmentIds(query_ids, ids)
    return heads_first(jax.vmap(kernel)(q, heads_first(k), heads_first(v), both))


def _length_axes(rules: sharding.Rules) -> tuple[str, ...]:
    """Return the axes of the mesh that split the length of rows."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    return tuple(axis for axis in rules.mesh_axes("act_length") if mesh.shape[axis] > 1)


def _by_length(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    *,
    causal: bool,
    implementation: Literal["xla", "splash"],
    rules: sharding.Rules,
    row_axis: str,
    interpret: bool,
) -> jax.Array:
    """Attend from each device's queries to the keys and values of whole rows, gathered there."""
    mesh, axes = jax.sharding.get_abstract_mesh(), _length_axes(rules)
    num_parts = math.prod(mesh.shape[axis] for axis in axes)
    t = q.shape[1]
    if t % num_parts:
        raise ValueError(f"rows must be a multiple of {num_parts} places, the parts, got {t}")
    heads = sharding.spec(rules, row_axis, "act_length", "act_heads", None)
    kv_heads = sharding.spec(rules, row_axis, "act_length", "act_kv_heads", None)
    places = sharding.spec(rules, row_axis, "act_length")
    gather = functools.partial(jax.lax.all_gather, axis_name=axes, axis=1, tiled=True)

    def xla(_: Any, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        first = jax.lax.axis_index(axes) * q.shape[1]
        return _xla_part(q, gather(k), gather(v), ids, gather(ids), causal=causal, first=first)

    def splash(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        return _run_splash(kernel, q, gather(k), gather(v), ids, gather(ids))

    run, kernel, kernel_spec = xla, None, None
    if implementation == "splash":
        head_parts = math.prod(mesh.shape[a] for a in sharding.axis_names(heads[2]))
        kernel = _splash_kernel(
            t, q.shape[2] // head_parts, causal=causal, interpret=interpret, num_parts=num_parts
        )
        run, kernel_spec = splash, jax.sharding.PartitionSpec()
        if causal:  # the parts have masks of their own
            parts = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, axes))
            kernel_spec = kernel.manual_sharding_spec(parts)
    return jax.shard_map(
        run,
        in_specs=(kernel_spec, heads, kv_heads, kv_heads, places),
        out_specs=heads,
        check_vma=False,
    )(kernel, q, k, v, segments.ids)


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
    return jax.shard_map(
        run,
        in_specs=(heads, kv_heads, kv_heads, Segments(ids=rows, lengths=rows, offsets=rows)),
        out_specs=heads,
        check_vma=False,
    )(q, k, v, segments)
