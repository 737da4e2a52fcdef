"""Metrics of and corrections for the difference between sampler and trainer log-probs.

The correction is off unless a stage passes weights to its policy loss; the metrics are always
computed. Weights carry no gradient and change totals only: a masked token still counts in the
denominators, which come from the response masks alone.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from prism_jax import metrics


def ratios(
    trainer_logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    level: Literal["token", "sequence"],
) -> Float[Array, "B T"]:
    """Return trainer probability / sampler probability, without gradient; 1 where masked.

    "token" is the ratio of each token, "sequence" the product over the row's unmasked tokens,
    repeated on each. Log-ratios are clamped to ±20.
    """
    log_ratio = _log_ratio(trainer_logprobs, sampler_logprobs, mask)
    if level == "sequence":
        log_ratio = jnp.broadcast_to(log_ratio.sum(-1, keepdims=True), mask.shape)
    elif level != "token":
        raise ValueError(f"level must be token or sequence, got {level!r}")
    return jnp.where(mask, jnp.exp(jnp.clip(log_ratio, -20.0, 20.0)), 1.0)


def truncated_weights(ratio: Float[Array, "B T"], *, high: float) -> Float[Array, "B T"]:
    """Return min(ratio, high): truncated importance sampling."""
    return jnp.minimum(ratio, high)


def masked_weights(ratio: Float[Array, "B T"], *, low: float, high: float) -> Float[Array, "B T"]:
    """Return the ratio where low <= ratio <= high, else 0: importance sampling with masking."""
    return jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def measure(
    trainer_logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    weights: Float[Array, "B T"] | None,
) -> metrics.Metrics:
    """Return the mismatch metrics over unmasked tokens, with weights their mean and share of 0.

    With d = trainer − sampler log-prob: the mean and the largest |d| in nats, the estimate
    exp(d) − 1 − d of KL(sampler ‖ trainer), and the largest ratio exp(d) either way as |d|.
    """
    log_ratio = jnp.clip(_log_ratio(trainer_logprobs, sampler_logprobs, mask), -20.0, 20.0)
    distance = jnp.abs(log_ratio)
    logged = {
        "policy/sampler_logprob_difference_mean": metrics.Mean.of(distance, mask),
        "policy/sampler_logprob_difference_max": metrics.Max.of(distance, mask),
        "policy/sampler_kl": metrics.Mean.of(jnp.expm1(log_ratio) - log_ratio, mask),
    }
    if weights is not None:
        logged["policy/sampler_weight_mean"] = metrics.Mean.of(weights, mask)
        logged["policy/sampler_weight_zero_fraction"] = metrics.Mean.of(weights == 0, mask)
    return logged


def _log_ratio(trainer_logprobs: Array, sampler_logprobs: Array, mask: Array) -> Array:
    log_ratio = jnp.where(mask, trainer_logprobs, 0.0) - jnp.where(mask, sampler_logprobs, 0.0)
    return jax.lax.stop_gradient(log_ratio)
