"""Supervised loss: negative log-likelihood of the assistant's tokens."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from prism_jax import metrics
from prism_jax.losses import logprob, reduce


def next_token_targets(
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    is_assistant: Bool[Array, "B T"],
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Shift tokens left by one: targets[b, t] = tokens[b, t + 1], and the mask of real targets.

    A target counts if it is an assistant token of the same packed segment as its predictor:

        tokens       U  A  B  .  u  a  .  0      (U, u user; A, B, a, . assistant; 0 padding)
        segment_ids  1  1  1  1  2  2  2  0
        targets      A  B  .  u  a  .  0  -
        target_mask  1  1  1  0  1  1  0  0

    Segment 0 is padding and never a target.
    """
    last = jnp.zeros_like(tokens[:, :1])
    targets = jnp.concatenate([tokens[:, 1:], last], axis=1)
    next_segment = jnp.concatenate([segment_ids[:, 1:], last], axis=1)
    next_assistant = jnp.concatenate([is_assistant[:, 1:], last.astype(bool)], axis=1)
    target_mask = next_assistant & (next_segment == segment_ids) & (segment_ids > 0)
    return targets, target_mask


def nll(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    target_mask: Bool[Array, "B T"],
    *,
    chunk_tokens: int,
    implementation: Literal["recompute", "fused"],
) -> tuple[reduce.Sum, metrics.Metrics]:
    """Return Σ −log p(targets[b, t] | hidden[b, t]) over unmasked targets; weight: their number.

    "recompute" computes the logits of each chunk again in the backward pass, "fused" computes the
    gradients in the forward pass: the same step with a head matmul less.
    """
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    flat_targets, flat_mask = targets.reshape(-1), target_mask.reshape(-1)
    if implementation == "fused":
        total, _ = logprob.weighted_logprobs(
            flat_hidden,
            head,
            flat_targets,
            -flat_mask.astype(jnp.float32),
            temperature=1.0,
            chunk_tokens=chunk_tokens,
        )
    elif implementation == "recompute":
        logprobs, _ = logprob.token_logprobs(
            flat_hidden,
            head,
            flat_targets,
            temperature=1.0,
            chunk_tokens=chunk_tokens,
            with_entropy=False,
        )
        total = jnp.where(flat_mask, -logprobs, 0.0).sum()
    else:
        raise ValueError(f"implementation must be recompute or fused, got {implementation!r}")
    num_targets = target_mask.sum(dtype=jnp.float32)
    logged = {
        "loss/nll": metrics.Mean(total=total, weight=num_targets),
        "data/target_tokens": metrics.Sum(value=num_targets),
    }
    return reduce.Sum(total=total, weight=num_targets), jax.lax.stop_gradient(logged)
