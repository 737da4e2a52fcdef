"""The discriminator's update by the gradients of its scores, see `discriminator.loss`."""

import jax
import jax.numpy as jnp

from models import discriminator
from prism_jax import metrics
from prism_jax.discriminator import balance
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import penalty as penalty_lib
from prism_jax.losses import reduce
from prism_jax.training import train_step

SCORES = "scores"


def coefficients(router: float, settings: discriminator_loss.Settings) -> dict[str, float]:
    """Return the factor of each term; those of the pair loss are in the gradients already."""
    terms = {SCORES: 1.0} | ({balance.ROUTER: router} if router else {})
    return terms | penalty_lib.coefficients(settings.penalty)


def weights(
    batch: discriminator_batch.SegmentBatch, router: float, settings: discriminator_loss.Settings
) -> dict[str, jax.Array]:
    """Return the weights of `loss`: the gradients are those of the whole batch already.

    Without any gradient there is nothing to learn, nor from the other terms: all weights are 0.
    """
    has_gradient = (batch.score_gradients != 0).any().astype(jnp.float32)
    whole = {SCORES: jnp.ones(())} | balance.weight(batch, router)
    whole |= penalty_lib.weight(batch, settings.penalty)
    return {name: weight * has_gradient for name, weight in whole.items()}


def loss(
    model: discriminator.Discriminator,
    batch: discriminator_batch.SegmentBatch,
    router: float,
    settings: discriminator_loss.Settings,
    key: jax.Array,
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return the sum over segments of score x its gradient; only its gradient has a meaning."""
    raw, stats = discriminator_loss.scores(model, batch, settings, key)
    total = jnp.where(batch.is_segment, raw * batch.score_gradients, 0.0).sum()
    terms, logged = balance.term(batch, stats, router)
    logged["discriminator/segments"] = metrics.Sum(value=batch.is_segment.sum(dtype=jnp.float32))
    if settings.penalty is not None:
        # The key of the scores again, so that both drop the same places.
        noise = penalty_lib.noise_of(batch, settings.penalty, jax.random.fold_in(key, 1))
        noisy, _ = discriminator_loss.scores(model, batch, settings, key, noise)
        squares = jnp.square((noisy - raw) / settings.penalty.noise)
        penalty = reduce.Sum(
            total=jnp.where(batch.is_segment, squares, 0.0).sum(),
            weight=batch.is_segment.sum(dtype=jnp.float32),
        )
        terms |= {penalty_lib.PENALTY: penalty}
        logged["discriminator/gradient_penalty"] = jax.lax.stop_gradient(
            metrics.Mean(total=penalty.total, weight=penalty.weight)
        )
    return {SCORES: reduce.Sum(total=total, weight=jnp.ones(()))} | terms, logged
