"""The router's choices by kind of segment, and how experts are used by captions and by cots."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import discriminator, kinds, shared
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss


def make_counter(
    graphdef: nnx.GraphDef, settings: discriminator_loss.Settings
) -> Callable[[nnx.State, discriminator_batch.SegmentBatch], jax.Array]:
    """Return the jitted `(params, batch) -> float32[L, A, E]` choices of a mixture of experts.

    With a token router only the segments' tokens count: those of a prompt come before them,
    so they are routed alike whichever segment follows. With a segment router all tokens of a
    sequence count, as all of them are routed by its kind.
    """

    def of_part(params: nnx.State, part: discriminator_batch.SegmentBatch) -> jax.Array:
        model = nnx.merge(graphdef, params)
        text, kind = part.text, None
        if text.shared is None:
            by_kind = model.trunk.config.text.moe.router == "segment"
            kind = _of_tokens(part, counts_prompts=by_kind)
        else:
            counted = shared.with_kinds(text.shared, part.kind, len(kinds.NAMES))
            is_prompt = jnp.arange(text.tokens.shape[1]) < text.shared.copies.shape[1]
            weights = jnp.where(is_prompt[:, None], 0, counted.kind_weights)
            counted = dataclasses.replace(counted, kind_weights=weights)
            text = dataclasses.replace(text, shared=counted)
        _, stats = model.trunk(
            text,
            part.vision,
            implementation=settings.implementation,
            remat=settings.remat,
            kind=kind,
        )
        return stats.by_kind.choices

    def count(params: nnx.State, batch: discriminator_batch.SegmentBatch) -> jax.Array:
        shape = jax.eval_shape(of_part, params, jax.tree.map(lambda x: x[0], batch))

        # A microbatch without segments is not computed, as in `discriminator.loss.scores`.
        def or_zeros(part: discriminator_batch.SegmentBatch) -> jax.Array:
            return jax.lax.cond(
                part.is_segment.any(),
                lambda: of_part(params, part),
                lambda: jnp.zeros(shape.shape, shape.dtype),
            )

        return jax.lax.map(or_zeros, batch).sum(0)

    return jax.jit(count)


def _of_tokens(part: discriminator_batch.SegmentBatch, *, counts_prompts: bool) -> jax.Array:
    """Return int32[B, T], the kind of each token; a number past the last kind is not counted."""
    ids = part.text.segments.ids
    kind = discriminator.kind_of_tokens(part.kind, ids)
    if counts_prompts:
        return kind
    first = discriminator.kind_of_tokens(part.last - part.num_tokens + 1, ids)
    return jnp.where(jnp.arange(ids.shape[1]) >= first, kind, len(kinds.NAMES))


def loads(choices: np.ndarray) -> np.ndarray:
    """Return the share of each kind's choices that fell on each expert, NaN for an unseen kind.

    Args:
      choices: float[L, A, E], how many tokens of each kind chose each expert.
    """
    total = choices.sum(-1, keepdims=True)
    return np.divide(choices, total, out=np.full(choices.shape, np.nan), where=total > 0)


def information_bits(choices: np.ndarray) -> np.ndarray:
    """Return the mutual information between expert and kind in each layer, bits[L].

    Kinds count alike, regardless of their number of tokens. With two kinds it is 1 where no expert
    serves both, and 0 where both use the experts alike, or with one kind alone.

        I = H(mean over k of p(e | k)) - mean over k of H(p(e | k))
    """
    seen = choices.sum((0, 2)) > 0
    if seen.sum() < 2:
        return np.zeros(len(choices))
    share = loads(choices[:, seen])  # [L, A, E]
    return _entropy_bits(share.mean(1)) - _entropy_bits(share).mean(1)


def _entropy_bits(share: np.ndarray) -> np.ndarray:
    return -(share * np.log2(np.where(share > 0, share, 1.0))).sum(-1)
