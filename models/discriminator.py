"""The discriminator: a trunk without output head, and a scalar score at a segment's last token."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models import attention, kinds, layers, moe, sharding, shared
from models.config import Qwen3VLConfig
from models.inputs import Leaf, TextInput, VisionInput
from models.noise import EmbeddingNoise
from models.qwen3_vl import Qwen3VL
from models.text import Remat


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadDropout:
    """Dropout on the head's input: each number with probability `rate`, the others scaled up.

    Source: PRISM moe/value_head.py:295,330: 0.1, active in every update and never in scoring.
    """

    rate: float = dataclasses.field(metadata={"static": True})
    key: Leaf  # the same key drops the same places in each call


class Discriminator(nnx.Module):
    """A scorer of segments; the trunk may be a mixture of experts, dense, or text-only.

    `config.text.moe.router` and `config.score_heads` decide whether captions and cots have separate
    experts and score heads, see `models.kinds`.

    Source: PRISM moe/value_head.py Qwen3VLMoeValueHead: a linear map without bias on the last
    normalised hidden state.
    """

    def __init__(
        self,
        config: Qwen3VLConfig,
        *,
        moe_implementation: moe.Implementation | None,
        rules: sharding.Rules,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.num_heads = config.score_heads
        self.trunk = Qwen3VL(
            config,
            has_head=False,
            moe_implementation=moe_implementation,
            rules=rules,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        scope = layers.Scope(
            rngs=rngs, param_dtype=param_dtype, dtype=dtype, std=config.initializer_range
        )
        self.score = layers.Linear(
            config.text.hidden_size,
            self.num_heads,
            axes=("embed", "score"),
            use_bias=False,
            scope=scope,
        )

    def __call__(
        self,
        text: TextInput,
        vision: VisionInput | None,
        last: Int[Array, "B U"],
        *,
        implementation: attention.Implementation,
        remat: Remat,
        kind: Int[Array, "B U"] | None = None,
        head_dropout: HeadDropout | None = None,
        score_dtype: DTypeLike | None = None,
        noise: EmbeddingNoise | None = None,
    ) -> tuple[Float[Array, "B U"], moe.RouterStats | None]:
        """Return a score per segment, float32, and the router's counts per layer (None if dense).

        Args:
          last: place in its row of each segment's scored token; any valid place for a slot
            without a segment, whose score is meaningless.
          kind: of each segment, see `models.kinds`; slot u is the row's sequence u + 1. A segment
            router and two heads need it; without it the router's counts are not split by kind.
          score_dtype: the head's input, weights and score are rounded to this type, as in a head of
            that type; None: the head is float32. Scores are float32 arrays either way.
        """
        if kind is None and self.num_heads > 1:
            raise ValueError("a discriminator with two heads must be told the kind of each segment")
        token_kind = None
        if kind is not None and text.shared is not None:
            counted = shared.with_kinds(text.shared, kind, len(kinds.NAMES))
            text = dataclasses.replace(text, shared=counted)
        elif kind is not None:
            token_kind = kind_of_tokens(kind, text.segments.ids)
        hidden, stats = self.trunk(
            text,
            vision,
            implementation=implementation,
            remat=remat,
            kind=token_kind,
            noise=noise,
        )
        scored = jnp.take_along_axis(hidden, last[..., None], axis=1)  # [B, U, D]
        scored = scored.astype(jnp.float32)
        if head_dropout is not None:
            is_kept = jax.random.bernoulli(head_dropout.key, 1 - head_dropout.rate, scored.shape)
            scored = jnp.where(is_kept, scored / (1 - head_dropout.rate), 0)
        kernel = self.score.kernel[...].astype(jnp.float32)
        scores = _rounded(scored, score_dtype) @ _rounded(kernel, score_dtype)  # [B, U, heads]
        scores = _rounded(scores, score_dtype)
        if self.num_heads == 1:
            return scores[..., 0], stats
        caption, cot = scores[..., 0], scores[..., 1]
        segment_scores = jnp.where(kind == kinds.COT, cot, caption)
        return jnp.where(kind == kinds.WHOLE, (caption + cot) / 2, segment_scores), stats


def _rounded(x: Float[Array, "..."], dtype: DTypeLike | None) -> Float[Array, "..."]:
    """Round to the numbers of a type, in float32; unlike a pair of casts, XLA cannot drop this."""
    if dtype is None:
        return x
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)


def kind_of_tokens(kind: Int[Array, "B U"], ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the kind of each token's sequence; padding counts as sequence 1."""
    slots = jnp.clip(ids - 1, 0, kind.shape[1] - 1)
    return jnp.take_along_axis(kind, slots, axis=1)
