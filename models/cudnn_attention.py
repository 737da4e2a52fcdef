"""Attention by cuDNN on NVIDIA GPUs, through the private functions of JAX that it needs.

`models.attention` and `models.decode_attention` load this module only where cuDNN is chosen: it
rests on `jax._src`, which is no part of JAX's interface.
"""

import math

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jaxtyping import Array, Float, Int

from models.inputs import Segments

# Up to this many queries of a kv head are passed as query heads of one query each, which is faster;
# more are passed as the queries of one head.
_MOST_GROUPED = 8


def check(q: jax.Array) -> None:
    """Raise NotImplementedError for queries that cuDNN does not take."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cudnn attention needs bfloat16 or float16, got {q.dtype}")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise NotImplementedError(f"cudnn attention: head size {q.shape[-1]} is not 8, 16, … 256")


def packed(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Segments,
    *,
    causal: bool,
) -> Float[Array, "B T N H"]:
    """Attend with cuDNN's packed ("THD") kernels, which skip everything outside a segment.

    Up to JAX 0.10 the offsets of grouped keys were silently wrong, repaired by JAX pull request
    39521.
    """
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"packed cudnn attention needs JAX 0.11 or later, this is {jax.__version__}: earlier "
            "versions compute wrong results for grouped-query attention"
        )
    mask_type = cudnn.MaskType.PADDING_CAUSAL if causal else cudnn.MaskType.PADDING
    return cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=segments.lengths,
        kv_seqlen=segments.lengths,
        q_offsets=segments.offsets,
        kv_offsets=segments.offsets,
        scale=1 / math.sqrt(q.shape[-1]),
        mask_type=mask_type,
    )


def part(
    q: Float[Array, "B K T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B K T H"], Float[Array, "B K T"]]:
    """Attend from T queries a kv head to the first `lengths` places; see `decode_attention.part`.

    The kernel does not read beyond a row's length. The public function would round the
    log-sum-exp to bfloat16; here it is float32.
    """
    rows, _, queries, head_dim = q.shape
    if queries <= _MOST_GROUPED:
        q = q.reshape(rows, -1, 1, head_dim)
    mixed, lse = cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=jnp.full_like(lengths, q.shape[2]),
        kv_seqlen=lengths,
        scale=1 / math.sqrt(q.shape[-1]),
        mask_type=cudnn.MaskType.PADDING,
        qkv_layout="BNTH",
        return_residual=True,
    )
    shape = (rows, k.shape[1], queries)
    return mixed.reshape(*shape, head_dim), lse.reshape(shape)
