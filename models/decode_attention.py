"""Attention of one new token a row to its cache: the row's places, and a prompt that rows share.

The two parts are attended to separately and merged in float32 by their log-sum-exp, so that a
prompt is read once for all its readers.

  implementation  where               reads
  "xla"           everywhere          every place of the cache, masked
  "pallas"        TPU                 blocks up to each length
  "cudnn"         NVIDIA, bf16/fp16   up to each length

An implementation raises for anything that it cannot do; none falls back to another.
"""

import functools
import importlib
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models import decode_kernel, sharding
from models.cache import Cache, Prompts

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
    """Attend from T queries a kv head to the first `lengths` >= 1 places of each row.

    Returns:
      The mixed values and the log-sum-exp of the logits, float32, with which parts are merged.
    """
    if implementation == "xla":
        return _masked_softmax(q, k, v, lengths)
    if implementation == "pallas":
        return decode_kernel.part(q, k, v, lengths)
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


def merge(first: _Part, second: _Part) -> Float[Array, "B K T H"]:
    """Return the result of attending to both parts at once, float32."""
    most = jnp.maximum(first[1], second[1])
    a, b = (jnp.exp(lse - most)[..., None] for _, lse in (first, second))
    return (first[0].astype(jnp.float32) * a + second[0].astype(jnp.float32) * b) / (a + b)


def write(
    cache: Float[Array, "B K S H"], new: Float[Array, "B K H"], lengths: Int[Array, "B"]
) -> Float[Array, "B K S H"]:
    """Write one token at place `lengths` of each row; a full row stays as it is."""
    rows, heads = jnp.arange(cache.shape[0])[:, None], jnp.arange(cache.shape[1])[None]
    # Without the promise that no place is written twice a GPU may write with atomics.
    return cache.at[rows, heads, lengths[:, None]].set(
        new.astype(cache.dtype), unique_indices=True, indices_are_sorted=True, mode="drop"
    )


def attend(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    layer: Cache,
    *,
    implementation: Implementation,
    rules: sharding.Rules,
) -> tuple[Float[Array, "B 1 N H"], tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Write one token a row and attend to all before it and itself.

    Query head n reads kv head n // (N / K).

    Args:
      layer: of one layer; its lengths are those before the token.

    Returns:
      The mixed values, and the keys and values of the layer's classes with the token.
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
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Attend on the rows and heads of one device."""
    num_rows, _, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    is_running = layer.is_running
    if is_running is None:
        is_running = jnp.ones(num_rows, bool)
    used = jnp.where(is_running, layer.lengths + 1, 1)
    start, keys, values, parts = 0, [], [], []
    for class_keys, class_values in zip(layer.keys, layer.values, strict=True):
        rows = slice(start, start + class_keys.shape[0])
        keys.append(write(class_keys, k[rows, 0], layer.lengths[rows]))
        values.append(write(class_values, v[rows, 0], layer.lengths[rows]))
        parts.append(
            part(grouped[rows], keys[-1], values[-1], used[rows], implementation=implementation)
        )
        start = rows.stop
    responses = tuple(x[0] if len(x) == 1 else jnp.concatenate(x) for x in zip(*parts, strict=True))
    mixed = responses[0]
    if layer.prompts is not None:
        mixed = merge(
            responses, _attend_prompts(grouped, layer.prompts, is_running, implementation)
        )
    return mixed.astype(q.dtype).reshape(q.shape), tuple(keys), tuple(values)


def _attend_prompts(
    q: Float[Array, "B K G H"],
    prompts: Prompts,
    is_running: Bool[Array, "B"],
    implementation: Implementation,
) -> _Part:
    """Attend to each row's prompt, with all readers of a prompt side by side as its queries."""
    num_prompts, num_places = prompts.readers.shape
    _, num_kv_heads, groups, head_dim = q.shape
    readers = jnp.maximum(prompts.readers, 0)
    is_read = ((prompts.readers >= 0) & is_running[readers]).any(-1)
    folded = jnp.swapaxes(q[readers], 1, 2)  # [prompts, K, readers, G, H]
    mixed, lse = part(
        folded.reshape(num_prompts, num_kv_heads, num_places * groups, head_dim),
        prompts.keys,
        prompts.values,
        jnp.where(is_read, prompts.lengths, 1),
        implementation=implementation,
    )
    mixed, lse = (x.reshape(*folded.shape[:4], *x.shape[3:]) for x in (mixed, lse))
    return mixed[prompts.number, :, prompts.place], lse[prompts.number, :, prompts.place]
