"""A zero-centred gradient penalty on the discriminator's input, without second derivatives.

    r1 ≈ (score(x + σ · rms(x) · n) − score(x))² / σ²      n standard normal on a segment's tokens

Its mean over n tends to the squared norm of the score's gradient with respect to the segment's
embedded tokens, in units of their size. A flat score is a slower and steadier opponent, and a
sharp one can be led astray by details. Both sides are penalised. It costs a second forward and
backward pass of each update.
Source: arXiv 1801.04406 (R1); arXiv 2501.08316 §3.4 (the estimate by noise, for attention kernels
that have no second derivative).
"""

import dataclasses

import jax
import jax.numpy as jnp

from models import noise
from prism_jax.discriminator import batch as discriminator_batch

PENALTY = "gradient_penalty"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Penalty:
    """The numbers of the penalty."""

    coefficient: float
    noise: float  # σ, relative to the size of an embedded token


def noise_of(
    batch: discriminator_batch.SegmentBatch, penalty: Penalty, key: jax.Array
) -> noise.EmbeddingNoise:
    """Return the noise on the tokens of the segments of one microbatch."""
    places = jnp.arange(batch.text.tokens.shape[-1])
    last, first = batch.last[..., None], (batch.last - batch.num_tokens)[..., None]
    is_inside = (places > first) & (places <= last) & batch.is_segment[..., None]
    return noise.EmbeddingNoise(scale=penalty.noise, key=key, mask=is_inside.any(-2))


def weight(
    batch: discriminator_batch.SegmentBatch, penalty: Penalty | None
) -> dict[str, jax.Array]:
    """Return the weight of the term over a batch: its segments."""
    return {} if penalty is None else {PENALTY: batch.is_segment.sum(dtype=jnp.float32)}


def coefficients(penalty: Penalty | None) -> dict[str, float]:
    """Return the factor of the term."""
    return {} if penalty is None else {PENALTY: penalty.coefficient}
