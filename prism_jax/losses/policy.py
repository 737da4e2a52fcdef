"""Policy-gradient losses over the tokens of responses; a row is a response.

Index t of each array is the t-th response token: logprobs[b, t] is the log-prob of that token
given the tokens before it. Advantages are [B, 1] for a whole response or [B, T].

Strictly on-policy, `old_logprobs` is `jax.lax.stop_gradient(logprobs)`: the ratio is 1, nothing is
clipped and no extra forward pass is needed. With several updates per rollout, it holds the
trainer's log-probs before the first update. The sampler's log-probs differ from these, see
`mismatch`, whose weights all losses here take (`token_weights`, None is off). They are used as
`old_logprobs` only for responses of an older policy, which the trainer can no longer evaluate.

Overlong filtering is a mask: clear the rows of responses cut by the length limit, and they count
neither in totals nor in weights.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from prism_jax import metrics
from prism_jax.losses import reduce


def ppo(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B #T"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    token_weights: Float[Array, "B T"] | None,
    aggregation: reduce.Aggregation,
    norm_tokens: int | None,
) -> tuple[reduce.Sum, metrics.Metrics]:
    """Return the token-level clipped loss (GRPO, DAPO and Dr.GRPO use it).

    With r = exp(logprobs − old_logprobs), the difference clamped to ±20, and advantage A:

        l = max(−A · r, −A · clip(r, 1 − clip_low, 1 + clip_high))
        l = min(l, −A · dual_clip)        where A < 0, unless dual_clip is None

    `dual_clip` must be above 1. Metrics, over unmasked tokens: the share where the clipped side
    is larger, the share where the dual clip binds, and the mean of old_logprobs − logprobs.
    Source: PRISM verl/verl/trainer/ppo/core_algos.py:1071.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be None or > 1, got {dual_clip}")
    log_ratio = jnp.clip(_log_ratio(logprobs, old_logprobs, mask), -20.0, 20.0)
    losses, is_clipped = _clip(jnp.exp(log_ratio), advantages, clip_low, clip_high)
    logged = {
        "policy/clip_fraction": metrics.Mean.of(is_clipped, mask),
        "policy/approx_kl": metrics.Mean.of(-log_ratio, mask),
    }
    if dual_clip is not None:
        limit = -advantages * dual_clip
        is_dual_clipped = (losses > limit) & (advantages < 0)
        losses = jnp.where(is_dual_clipped, limit, losses)
        logged["policy/dual_clip_fraction"] = metrics.Mean.of(is_dual_clipped, mask)
    return _finish(losses, mask, logged, token_weights, aggregation, norm_tokens)


def gspo(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B #T"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: float,
    clip_high: float,
    token_weights: Float[Array, "B T"] | None,
    aggregation: reduce.Aggregation,
    norm_tokens: int | None,
) -> tuple[reduce.Sum, metrics.Metrics]:
    """Return the clipped loss with one ratio per response (GSPO).

    The ratio is the geometric mean over the response's n unmasked tokens. Its gradient is
    distributed to the tokens, and it is clipped as in `ppo`:

        r[b, t] = exp(stop(Σ_t (logprobs − old_logprobs) / n) + logprobs − stop(logprobs))

    The exponent is clamped above at 10. There is no dual clip. The paper's aggregation is
    seq-mean-token-mean. Metrics as in `ppo`.
    Source: arXiv 2507.18071; PRISM verl/verl/trainer/ppo/core_algos.py:1163.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    num_tokens = jnp.maximum(mask.sum(-1, keepdims=True, dtype=jnp.float32), 1.0)
    mean_log_ratio = jax.lax.stop_gradient(log_ratio.sum(-1, keepdims=True) / num_tokens)
    # log_ratio instead of logprobs: the same gradient, and finite where masked.
    shared = mean_log_ratio + log_ratio - jax.lax.stop_gradient(log_ratio)
    ratio = jnp.exp(jnp.minimum(shared, 10.0))
    losses, is_clipped = _clip(ratio, advantages, clip_low, clip_high)
    logged = {
        "policy/clip_fraction": metrics.Mean.of(is_clipped, mask),
        "policy/approx_kl": metrics.Mean.of(-log_ratio, mask),
    }
    return _finish(losses, mask, logged, token_weights, aggregation, norm_tokens)


def cispo(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B #T"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: float | None,
    clip_high: float,
    token_weights: Float[Array, "B T"] | None,
    aggregation: reduce.Aggregation,
    norm_tokens: int | None,
) -> tuple[reduce.Sum, metrics.Metrics]:
    """Return REINFORCE weighted by the clipped ratio as a constant: all tokens have a gradient.

        l = −stop(clip(r, 1 − clip_low, 1 + clip_high)) · A · logprobs

    r as in `ppo`; no lower bound when `clip_low` is None. The clip fraction counts ratios out of
    bounds.
    Source: arXiv 2506.13585 §3.1.
    """
    log_ratio = jnp.clip(_log_ratio(logprobs, old_logprobs, mask), -20.0, 20.0)
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
    bounded = jnp.clip(ratio, None if clip_low is None else 1.0 - clip_low, 1.0 + clip_high)
    losses = -bounded * advantages * jnp.where(mask, logprobs, 0.0)
    logged = {
        "policy/clip_fraction": metrics.Mean.of(bounded != ratio, mask),
        "policy/approx_kl": metrics.Mean.of(-log_ratio, mask),
    }
    return _finish(losses, mask, logged, token_weights, aggregation, norm_tokens)


def reinforce(
    logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B #T"],
    mask: Bool[Array, "B T"],
    *,
    token_weights: Float[Array, "B T"] | None,
    aggregation: reduce.Aggregation,
    norm_tokens: int | None,
) -> tuple[reduce.Sum, metrics.Metrics]:
    """Return −A · logprobs: the gradient of `ppo` on-policy, without ratio or clip."""
    losses = -advantages * jnp.where(mask, logprobs, 0.0)
    return _finish(losses, mask, {}, token_weights, aggregation, norm_tokens)


def _log_ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> Array:
    """Return logprobs − old_logprobs, and 0 where masked, even if a value there is not finite."""
    return jnp.where(mask, logprobs, 0.0) - jnp.where(mask, old_logprobs, 0.0)


def _clip(ratio: Array, advantages: Array, low: float, high: float) -> tuple[Array, Array]:
    """Return max(−A·r, −A·clip(r)) and a mask of the tokens where the clipped side is larger.

    `where` instead of `maximum` gives a tie the gradient of the ratio.
    """
    free = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - low, 1.0 + high)
    is_clipped = clipped > free
    return jnp.where(is_clipped, clipped, free), is_clipped


def _finish(
    losses: Array,
    mask: Array,
    logged: metrics.Metrics,
    token_weights: Array | None,
    aggregation: reduce.Aggregation,
    norm_tokens: int | None,
) -> tuple[reduce.Sum, metrics.Metrics]:
    """Weigh and aggregate the token losses; add the loss to the metrics."""
    if token_weights is not None:
        losses = losses * jax.lax.stop_gradient(token_weights)
    term = reduce.aggregate(losses, mask, aggregation=aggregation, norm_tokens=norm_tokens)
    logged = logged | {"policy/loss": metrics.Mean(total=term.total, weight=term.weight)}
    return term, jax.lax.stop_gradient(logged)
