"""Where the tokens of captions and cots went: the router's choices by kind of segment."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from models import discriminator, kinds, shared
from prism_jax import discriminator_update, segment_rows


def make_counter(
    graphdef: nnx.GraphDef, settings: discriminator_update.Settings
) -> Callable[[nnx.State, segment_rows.SegmentBatch], jax.Array]:
    """Return the jitted `(params, batch) -> float32[L, K, E]` choices of a mixture of experts.

    With a token router only the segments' own tokens count: those of a prompt come before them,
    so they are routed alike whichever segment follows. With a segment router all tokens of a
    sequence count, as all of them are routed by its kind.
    """

    def of_part(params: nnx.State, part: segment_rows.SegmentBatch) -> jax.Array:
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

    def count(params: nnx.State, batch: segment_rows.SegmentBatch) -> jax.Array:
        one = jax.eval_shape(of_part, params, jax.tree.map(lambda x: x[0], batch))

        def or_nothing(part: segment_rows.SegmentBatch) -> jax.Array:
            return jax.lax.cond(
                part.is_segment.any(),
                lambda: of_part(params, part),
                lambda: jnp.zeros(one.shape, one.dtype),
            )

        return jax.lax.map(or_nothing, batch).sum(0)

    return jax.jit(count)


def _of_tokens(part: segment_rows.SegmentBatch, *, counts_prompts: bool) -> jax.Array:
    """Return int32[B, T], the kind of each token; one beyond the last kind is not counted."""
    ids = part.text.segments.ids
    kind = discriminator.kind_of_tokens(part.kind, ids)
    if counts_prompts:
        return kind
    first = discriminator.kind_of_tokens(part.last - part.num_tokens + 1, ids)
    return jnp.where(jnp.arange(ids.shape[1]) >= first, kind, len(kinds.NAMES))
