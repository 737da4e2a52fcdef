"""Attention of one new token a row to its cache: the row's blocks, and a prompt that rows share.

Blocks are attended to separately and merged in float32 by their log-sum-exp, so that a prompt is
read once for all its readers, and no block waits for the others of a long row.

  implementation  where               reads
  "xla"           everywhere          every place of the cache, masked
  "pallas"        TPU                 blocks up to each length
  "cudnn"         NVIDIA, bf16/fp16   up to each length

An implementation raises for anything that it cannot do; none falls back to another.
"""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from models import decode_kernel, sharding
from models.cache import Cache, Layout, Prompts

Implementation = Literal["xla", "pallas", "cudnn"]

_Part = tuple[Float[Array, "B K T H"], Float[Array, "B K T"]]


def part(
    q: Float[Array, "B K T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    lengths: Int[Array, "B"],
    *,
    implementation: Implementation,
) -> _Part:
    """Attend from T queries a kv head to the first `lengths` places of each row.

    The result of a row of length 0 means nothing: some implementations read its first place.

    Returns:
      The mixed values and the log-sum-exp of the logits, float32, with which parts are merged.
    """
    if implementation == "pallas":
        return decode_kernel.part(q, k, v, lengths)
    lengths = jnp.maximum(lengths, 1)
    if implementation == "xla":
        return _masked_softmax(q, k, v, lengths)
    if implementation == "cudnn":
        # Loaded here: it rests on private modules of JAX.
        cudnn = importlib.import_module("models.cudnn_attention")
        cudnn.check(q)
        return cudnn.part(q, k, v, lengths)
    raise NotImplementedError(f"attention implementation {implementation!r} cannot decode")


def _masked_softmax(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> _Part:
    logits = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    mask = (jnp.arange(k.shape[2]) < lengths[:, None])[:, None, None]
    logits = jnp.where(mask, logits / math.sqrt(q.shape[-1]), jnp.finfo(jnp.float32).min)
    most = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - most)
    total = weights.sum(-1, keepdims=True)
    weights = (weights / total).astype(q.dtype)
    mixed = jnp.einsum("bkts,bksh->bkth", weights, v, preferred_element_type=jnp.float32)
    return mixed, (most + jnp.log(total))[..., 0]


def merge(parts: Sequence[_Part]) -> Float[Array, "B K T H"]:
    """Return the result of attending to all parts at once, float32."""
    if len(parts) == 2:
        # One GPU kernel, since neither weight needs a value that both share.
        (_, a), (_, b) = parts
        weights = [1 / (1 + jnp.exp(other - own)) for own, other in ((a, b), (b, a))]
    else:
        most = functools.reduce(jnp.maximum, (lse for _, lse in parts))
        weights = [jnp.exp(lse - most) for _, lse in parts]
        total = sum(weights)
        weights = [weight / total for weight in weights]
    return sum(
        mixed.astype(jnp.float32) * weight[..., None]
        for (mixed, _), weight in zip(parts, weights, strict=True)
    )


def write(
    blocks: Float[Array, "blocks K S H"],
    new: Float[Array, "B K H"],
    lengths: Int[Array, "B"],
    layout: Layout,
) -> Float[Array, "blocks K S H"]:
    """Write one token at place `lengths` of each row; a full row stays as it is."""
    places = blocks.shape[2]
    number = jnp.minimum(lengths // places, layout.counts - 1)
    at, heads = (layout.first + number)[:, None], jnp.arange(blocks.shape[1])[None]
    # Without the promise that no place is written twice a GPU may write with atomics.
    return blocks.at[at, heads, (lengths - number * places)[:, None]].set(
        new.astype(blocks.dtype), unique_indices=True, indices_are_sorted=True, mode="drop"
    )


def attend(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    layer: Cache,
    *,
    implementation: Implementation,
    rules: sharding.Rules,
) -> tuple[Float[Array, "B 1 N H"], jax.Array, jax.Array]:
    """Write one token a row and attend to all before it and itself.

    Query head n reads kv head n // (N / K).

    Args:
      layer: of one layer; its lengths are those before the token.

    Returns:
      The mixed values, and the layer's keys and values with the token.
    """
    run = functools.partial(_attend, implementation=implementation)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or (implementation == "xla" and layer.prompts is None):
        return run(q, k, v, layer)
    rows = sharding.spec(rules, "batch")
    heads = sharding.spec(rules, "batch", None, "act_heads", None)
    kv_heads = sharding.spec(rules, "batch", None, "act_kv_heads", None)
    places = sharding.spec(rules, "batch", "act_kv_heads", None, None)
    specs = jax.tree.map(lambda leaf: places if leaf.ndim == 4 else rows, layer)
    return jax.shard_map(
        run,
        in_specs=(heads, kv_heads, kv_heads, specs),
        out_specs=(heads, specs.keys, specs.values),
        check_vma=False,
    )(q, k, v, layer)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: Cache, *, implementation: Implementation
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attend on the rows and heads of one device."""
    num_rows, _, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    is_running = layer.is_running
    if is_running is None:
        is_running = jnp.ones(num_rows, bool)
    keys = write(layer.keys, k[:, 0], layer.lengths, layer.layout)
    values = write(layer.values, v[:, 0], layer.lengths, layer.layout)
    used = jnp.where(is_running, layer.lengths + 1, 1)
    parts = _attend_blocks(grouped, keys, values, used, layer.layout, implementation)
    if layer.prompts is not None:
        parts += _attend_prompts(grouped, layer.prompts, is_running, implementation)
    mixed = parts[0][0] if len(parts) == 1 else merge(parts)
    return mixed.astype(q.dtype).reshape(q.shape), keys, values


def _attend_blocks(
    q: Float[Array, "B K G H"],
    keys: Float[Array, "blocks K S H"],
    values: Float[Array, "blocks K S H"],
    used: Int[Array, "B"],
    layout: Layout,
    implementation: Implementation,
) -> list[_Part]:
    """Attend to each row's blocks."""
    places = keys.shape[2]
    most = int(layout.counts.max())
    if most == 1:
        return [part(q, keys, values, used, implementation=implementation)]
    number = np.arange(len(layout.rows), dtype=np.int32) - layout.first[layout.rows]
    lengths = jnp.clip(used[layout.rows] - number * places, 0, places)
    mixed, lse = part(q[layout.rows], keys, values, lengths, implementation=implementation)
    blocks = [layout.first + np.minimum(n, layout.counts - 1) for n in range(most)]
    return [(mixed[at], _of_used(lse[at], used > n * places)) for n, at in enumerate(blocks)]


def _of_used(lse: jax.Array, is_used: jax.Array) -> jax.Array:
    """Return the log-sum-exp, minus infinity for a block in which the row has no place."""
    return jnp.where(is_used[:, None, None], lse, -jnp.inf)


def _attend_prompts(
    q: Float[Array, "B K G H"],
    prompts: Prompts,
    is_running: Bool[Array, "B"],
    implementation: Implementation,
) -> list[_Part]:
    """Attend to each row's prompt, with all readers of a prompt side by side as its queries."""
    num_prompts, num_readers = prompts.readers.shape
    _, num_kv_heads, groups, head_dim = q.shape
    num_blocks, places = prompts.keys.shape[0] // num_prompts, prompts.keys.shape[2]
    readers = jnp.maximum(prompts.readers, 0)
    is_read = ((prompts.readers >= 0) & is_running[readers]).any(-1)
    folded = jnp.swapaxes(q[readers], 1, 2)  # [prompts, K, readers, G, H]
    folded = folded.reshape(num_prompts, num_kv_heads, num_readers * groups, head_dim)
    lengths = jnp.where(is_read, prompts.lengths, 0)
    if num_blocks > 1:
        folded = jnp.repeat(folded, num_blocks, axis=0)
        number = np.arange(num_prompts * num_blocks, dtype=np.int32) % num_blocks
        lengths = jnp.clip(jnp.repeat(lengths, num_blocks) - number * places, 0, places)
    mixed, lse = part(folded, prompts.keys, prompts.values, lengths, implementation=implementation)
    mixed, lse = (
        x.reshape(num_prompts, num_blocks, num_kv_heads, num_readers, groups, *x.shape[3:])
        for x in (mixed, lse)
    )
    used, parts = prompts.lengths[prompts.number], []
    for number in range(num_blocks):
        own, lse_own = (x[prompts.number, number, :, prompts.place] for x in (mixed, lse))
        parts.append((own, _of_used(lse_own, used > number * places) if number else lse_own))
    return parts
