"""KL divergence from a reference policy: estimators, the loss term and the reward penalty."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from prism_jax import metrics
from prism_jax.losses import reduce

Estimator = Literal["k1", "k2", "k3", "abs"]  # for values alone
# For a loss term: "k3+" has the value of k3 and the gradient of k2.
LossEstimator = Literal["k1", "k2", "k3", "k3+", "abs"]


def estimate(
    logprobs: Float[Array, "*T"],
    reference_logprobs: Float[Array, "*T"],
    *,
    estimator: LossEstimator,
) -> Float[Array, "*T"]:
    """Estimate KL(policy ‖ reference) per token from the log-probs of tokens of the policy.

    With d = logprobs − reference_logprobs:

         value               expectation of its gradient, over tokens of the policy
    k1   d                   unbiased    0
    k2   d² / 2              biased      that of KL(policy ‖ reference)
    k3   exp(−d) + d − 1     unbiased    that of KL(reference ‖ policy), the other divergence
    k3+  the same            unbiased    that of KL(policy ‖ reference), as it is k2's
    abs  |d|                 biased      that of Σ |policy − reference|; 0 at d = 0

    k3 is never negative; its d is clamped to ±20 and its value to ±10, where its gradient is 0.
    The expectations hold for tokens sampled from the current policy: tokens of an older policy are
    not reweighted here.
    Source: PRISM verl/verl/trainer/ppo/core_algos.py:1639; http://joschu.net/blog/kl-approx.html.
    """
    difference = logprobs - reference_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * jnp.square(difference)
    if estimator == "k3":
        reverse = jnp.clip(-difference, -20.0, 20.0)
        return jnp.clip(jnp.exp(reverse) - reverse - 1.0, -10.0, 10.0)
    if estimator == "k3+":
        straight = estimate(logprobs, reference_logprobs, estimator="k2")
        value = estimate(logprobs, reference_logprobs, estimator="k3")
        return jax.lax.stop_gradient(value) + (straight - jax.lax.stop_gradient(straight))
    if estimator == "abs":
        # jnp.abs has the gradient 1 at 0, and d is 0 before the first update.
        return difference * jax.lax.stop_gradient(jnp.sign(difference))
    raise ValueError(f"estimator must be one of {LossEstimator.__args__}, got {estimator!r}")


def loss(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    estimator: LossEstimator,
    token_weights: Float[Array, "B T"] | None,
    aggregation: reduce.Aggregation,
    norm_tokens: int | None,
) -> tuple[reduce.Sum, metrics.Metrics]:
    """Return the KL term of a policy's objective, to be added with its coefficient.

    `token_weights` multiply the term's tokens, but not the metric's; None is off.
    """
    values = estimate(
        jnp.where(mask, logprobs, 0.0),
        jnp.where(mask, reference_logprobs, 0.0),
        estimator=estimator,
    )
    losses = values if token_weights is None else values * token_weights
    term = reduce.aggregate(losses, mask, aggregation=aggregation, norm_tokens=norm_tokens)
    logged = {"policy/reference_kl": metrics.Mean.of(values, mask)}
    return term, jax.lax.stop_gradient(logged)


def penalised_rewards(
    rewards: Float[Array, "B"],
    old_logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    coefficient: Float[Array, ""] | float,
    estimator: Estimator,
) -> tuple[Float[Array, "B T"], Float[Array, ""], metrics.Metrics]:
    """Return token rewards minus the KL penalty, the mean KL for `adapt`, and metrics.

    The token reward is −coefficient · kl[b, t], plus rewards[b] at the row's last unmasked token:
    their sum over T is the penalised reward of the response. The mean KL is the mean over rows
    of the mean over a row's unmasked tokens; rows without such tokens are left out.
    Source: PRISM verl/verl/trainer/ppo/ray_trainer.py apply_kl_penalty.
    """
    kl = estimate(
        jnp.where(mask, old_logprobs, 0.0),
        jnp.where(mask, reference_logprobs, 0.0),
        estimator=estimator,
    )
    kl = jnp.where(mask, kl, 0.0)
    positions = jnp.arange(mask.shape[1])
    last = jnp.where(mask, positions, -1).max(-1)
    is_last = positions == last[:, None]
    token_rewards = jnp.where(is_last, rewards[:, None], 0.0) - coefficient * kl
    mean_kl = reduce.aggregate(kl, mask, aggregation="seq-mean-token-mean", norm_tokens=None)
    logged = {"reward/reference_kl": metrics.Mean(total=mean_kl.total, weight=mean_kl.weight)}
    return token_rewards, mean_kl.value, logged


def adapt(
    coefficient: Float[Array, ""] | float,
    mean_kl: Float[Array, ""] | float,
    *,
    num_rows: int,
    target: float,
    horizon: float,
) -> Float[Array, ""]:
    """Return the next coefficient, adapted to bring the mean KL to `target`.

    coefficient · (1 + clip(mean_kl / target − 1, −0.2, 0.2) · num_rows / horizon). A fixed
    coefficient is never passed to this function. `horizon` is in responses.
    Source: arXiv 1909.08593 §2.2; PRISM verl/verl/trainer/ppo/core_algos.py:152.
    """
    error = jnp.clip(mean_kl / target - 1.0, -0.2, 0.2)
    return jnp.asarray(coefficient * (1.0 + error * num_rows / horizon), jnp.float32)
