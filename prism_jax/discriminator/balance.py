"""The router's load balance as a term of the discriminator's loss."""

import jax
import jax.numpy as jnp

from models import moe
from prism_jax import metrics
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.losses import reduce
from prism_jax.training import train_step

ROUTER = "router"


def weight(batch: discriminator_batch.SegmentBatch, coefficient: float) -> dict[str, jax.Array]:
    """Return the weight of the term over a batch; nothing without a coefficient."""
    if not coefficient:
        return {}
    return {ROUTER: _num_tokens(batch)}


def _num_tokens(batch: discriminator_batch.SegmentBatch) -> jax.Array:
    """Return the tokens of all sequences, those of a shared prompt once for each."""
    text = batch.text
    segments = text.segments if text.shared is None else text.shared.segments
    return (segments.ids > 0).sum(dtype=jnp.float32)


def term(
    batch: discriminator_batch.SegmentBatch, stats: moe.RouterStats | None, coefficient: float
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return the load balance of a microbatch, weighted by its tokens.

    It is not a sum over tokens, so it is the one term that depends on the split into microbatches:
    it asks for balance within each. It is measured even when its coefficient is 0.
    """
    if stats is None:
        return {}, {}
    tokens = _num_tokens(batch)
    total = moe.load_balance(stats) * tokens
    logged = {"discriminator/router_balance": metrics.Mean(total=total, weight=tokens)}
    if not coefficient:
        return {}, jax.lax.stop_gradient(logged)
    router = reduce.Sum(total=total, weight=tokens)
    return {ROUTER: router}, jax.lax.stop_gradient(logged)
