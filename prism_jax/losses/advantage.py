"""Advantages of responses, computed from the rewards of the responses to the same prompt.

Rows are responses; `prompt_id[b]` in [0, num_groups) is the prompt that row b answers. Groups may
have any size and order, and an id may have no row. A padding row must be in a separate group.
No gradient flows through an advantage. Group statistics are computed alike in all functions:

- standard deviation with ddof = 1, eps added to it: (x − mean) / (std + eps)
- a group of one response is defined to have mean 0 and std 1: the result is score / (1 + eps)
- a group of equal scores has exactly the advantage 0. The released code computes a float32 mean;
  its rounding error, divided by std + eps, reaches 0.1 (11 to 15 scores of 0.7)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from prism_jax.losses import groups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentScores:
    """The inputs of the six alignment advantages, with an entry per response."""

    prompt_id: Any  # int32[B]    group, in [0, num_groups)
    # {segment: float32[B]}  the discriminator's scores of the segments ("caption" and "cot",
    # "response", or all three); ignored where not format_ok
    by_segment: Any
    format_ok: Any  # bool[B]     the response has the required form
    accuracy: Any  # float32[B] or None  the judge's score; at most 0 is wrong
    # {segment: float32[B]}  the teacher's scores, for the scale "teacher"; None: not read
    teacher: Any = None
    # The scale of A_al; None: `group_normalise`.
    scale: groups.Scale | None = dataclasses.field(default=None, metadata={"static": True})


def group_normalise(
    values: Float[Array, "B"], prompt_id: Int[Array, "B"], *, num_groups: int, eps: float
) -> Float[Array, "B"]:
    """Return (x − mean) / (std + eps) within each group, std with ddof = 1.

    Source: PRISM verl/verl/trainer/ppo/core_algos.py:415.
    """
    centred = groups.centre(values, prompt_id, num_groups)
    return centred / (groups.deviation(centred, prompt_id, num_groups) + eps)


def grpo_part(
    part: Float[Array, "B"],
    rewards: Float[Array, "B"],
    prompt_id: Int[Array, "B"],
    *,
    num_groups: int,
    eps: float,
) -> Float[Array, "B"]:
    """Return `grpo` of a part of the rewards: centred by itself, over the whole's deviation.

    Parts that add up to the rewards have advantages that add up to those of the rewards; over its
    own deviation a small part would count as much as a large one.
    """
    whole = groups.centre(rewards, prompt_id, num_groups)
    spread = groups.deviation(whole, prompt_id, num_groups)
    return groups.centre(part, prompt_id, num_groups) / (spread + eps)


def grpo(
    rewards: Float[Array, "B"], prompt_id: Int[Array, "B"], *, num_groups: int, eps: float
) -> Float[Array, "B"]:
    """Return the rewards normalised within their group by mean and standard deviation.

    Source: arXiv 2402.03300; PRISM verl/verl/trainer/ppo/core_algos.py:267.
    """
    return group_normalise(rewards, prompt_id, num_groups=num_groups, eps=eps)


def dr_grpo(
    rewards: Float[Array, "B"], prompt_id: Int[Array, "B"], *, num_groups: int
) -> Float[Array, "B"]:
    """Return rewards minus their group's mean (a group of one: the reward).

    Source: arXiv 2503.20783.
    """
    return groups.centre(rewards, prompt_id, num_groups)


def rloo(
    rewards: Float[Array, "B"], prompt_id: Int[Array, "B"], *, num_groups: int
) -> Float[Array, "B"]:
    """Return each reward minus the mean of the *other* rewards of its group.

    (x − mean) · n / (n − 1) for a group of n; a group of one keeps its reward.
    Source: arXiv 2402.14740; PRISM verl/verl/trainer/ppo/core_algos.py:658.
    """
    size = groups.size(prompt_id, num_groups)
    return groups.centre(rewards, prompt_id, num_groups) * size / jnp.maximum(size - 1.0, 1.0)


def reinforce_plus_plus(
    token_rewards: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    discount: float,
    eps: float,
) -> Float[Array, "B T"]:
    """Return discounted returns, whitened over all unmasked tokens of the batch.

    G[b, t] = Σ_{u ≥ t} discount^(u − t) · token_rewards[b, u] over unmasked tokens;
    (G − mean) / √(variance + eps), variance with ddof = 1; 0 where masked. There are no groups.
    Source: arXiv 2501.03262; PRISM verl/verl/trainer/ppo/core_algos.py:764 (eps 1e-8).
    """

    def step(later, now):
        value = now + discount * later
        return value, value

    rewards = jnp.where(mask, token_rewards, 0.0)
    _, returns = jax.lax.scan(step, jnp.zeros_like(rewards[:, 0]), rewards.T, reverse=True)
    returns = returns.T
    num_tokens = mask.sum(dtype=jnp.float32)
    mean = jnp.where(mask, returns, 0.0).sum() / jnp.maximum(num_tokens, 1.0)
    deviation = jnp.where(mask, returns - mean, 0.0)
    variance = jnp.square(deviation).sum() / jnp.maximum(num_tokens - 1.0, 1.0)
    return deviation * jax.lax.rsqrt(variance + eps)


def overlong_penalty(
    response_tokens: Int[Array, "B"],
    *,
    max_response_tokens: int,
    buffer_tokens: int,
    factor: float,
) -> Float[Array, "B"]:
    """Return the penalty (at most 0) for responses that reach into the last `buffer_tokens`.

    min(0, −factor · (n − (max_response_tokens − buffer_tokens)) / buffer_tokens): 0 up to the
    start of the buffer, −factor at the length limit.
    Source: arXiv 2503.14476; PRISM verl/verl/workers/reward_manager/dapo.py:121.
    """
    excess = response_tokens - (max_response_tokens - buffer_tokens)
    return jnp.minimum(-excess.astype(jnp.float32) / buffer_tokens * factor, 0.0)


def align(
    scores: AlignmentScores,
    *,
    num_groups: int,
    eps: float,
    weights: Mapping[str, float],
    format_penalty: float,
) -> Float[Array, "B"]:
    """Return A_al − format_penalty · F, the default of the method; accuracy is not used.

    A_al = Σ over segments of weights[segment] · GN(score of the segment), with GN =
    `group_normalise` and F the responses of invalid format, here and in the five functions below.

    Invalid: the scores become (minimum over the group's valid ones) − 1, or −1 when none is
    valid, *before* GN, which lowers A_al of that row and raises the others'; then the penalty
    is subtracted. Wrong answers: no effect. A group of one: A_al is the weighted score
    itself, an invalid one −(sum of the weights). Equal scores, and a group of invalid responses
    only: A_al = 0.
    Source: PRISM verl/verl/trainer/ppo/core_algos.py:455, :534.
    """
    aligned = _aligned(scores, num_groups, eps, weights)
    return aligned - format_penalty * _invalid(scores)


def acc_gating(
    scores: AlignmentScores,
    *,
    num_groups: int,
    eps: float,
    weights: Mapping[str, float],
    align_coef: float,
    wrong_penalty: float,
    format_penalty: float,
) -> Float[Array, "B"]:
    """Return align_coef · A_al − wrong_penalty · W − format_penalty · F.

    W: valid format and accuracy <= 0. Invalid: as in `align`, never counted wrong as well.
    Wrong: the constant penalty, A_al stays. A group of one, equal scores: as in `align` for
    A_al; penalties apply as they are, they are not normalised.
    Source: PRISM verl/verl/trainer/ppo/core_algos.py:527.
    """
    aligned = _aligned(scores, num_groups, eps, weights)
    penalties = wrong_penalty * _wrong(scores) + format_penalty * _invalid(scores)
    return align_coef * aligned - penalties


def gated_align(
    scores: AlignmentScores,
    *,
    num_groups: int,
    eps: float,
    weights: Mapping[str, float],
    align_coef: float,
    wrong_penalty: float,
    format_penalty: float,
) -> Float[Array, "B"]:
    """Return align_coef · A_al · (1 − F)(1 − W) − wrong_penalty · W − format_penalty · F.

    Invalid and wrong responses get their penalty alone, but their scores still take part in the
    group's statistics (invalid ones as in `align`). A group of one, equal scores: as in
    `acc_gating`. The released run of this mode never received the accuracy, so W was 0: pass an
    accuracy of ones to repeat that.
    Source: PRISM verl/verl/trainer/ppo/core_algos.py:521, ray_trainer.py:1211.
    """
    aligned = _aligned(scores, num_groups, eps, weights)
    invalid, wrong = _invalid(scores), _wrong(scores)
    gated = align_coef * aligned * (1.0 - invalid) * (1.0 - wrong)
    return gated - wrong_penalty * wrong - format_penalty * invalid


def rlvr(
    scores: AlignmentScores,
    *,
    num_groups: int,
    eps: float,
    weights: Mapping[str, float],
    align_coef: float,
    accuracy_weight: float,
    format_weight: float,
) -> Float[Array, "B"]:
    """Return GN(r) + align_coef · A_al · (1 − F)(1 − W), r = w_acc · accuracy + w_fmt · (1 − F).

    Invalid and wrong: A_al is switched off, GN(r) alone remains; there are no penalties, and an
    invalid response keeps w_acc · accuracy if its answer was right. A group of one: GN(r) is r
    itself. Equal rewards: GN(r) = 0, valid right responses still have A_al.
    Source: PRISM verl/verl/trainer/ppo/core_algos.py:509.
    """
    aligned = _aligned(scores, num_groups, eps, weights)
    invalid, wrong = _invalid(scores), _wrong(scores)
    reward = accuracy_weight * _accuracy(scores) + format_weight * (1.0 - invalid)
    verified = group_normalise(reward, scores.prompt_id, num_groups=num_groups, eps=eps)
    return verified + align_coef * aligned * (1.0 - invalid) * (1.0 - wrong)


def rlvr_v2(
    scores: AlignmentScores,
    *,
    num_groups: int,
    eps: float,
    weights: Mapping[str, float],
    align_coef: float,
    accuracy_weight: float,
    format_weight: float,
    wrong_penalty: float,
    format_penalty: float,
) -> Float[Array, "B"]:
    """Return `rlvr` with r = w_acc · accuracy + w_fmt · (1 − F) − p_W · W − p_F · F.

    Invalid and wrong: as in `rlvr`, and their penalties are part of r, so they are normalised with
    the group. A group of one: r itself, penalties included. Equal r: GN(r) = 0 even if all are
    wrong or all invalid.
    Source: PRISM verl/verl/trainer/ppo/core_algos.py:497.
    """
    aligned = _aligned(scores, num_groups, eps, weights)
    invalid, wrong = _invalid(scores), _wrong(scores)
    reward = accuracy_weight * _accuracy(scores) + format_weight * (1.0 - invalid)
    reward = reward - wrong_penalty * wrong - format_penalty * invalid
    verified = group_normalise(reward, scores.prompt_id, num_groups=num_groups, eps=eps)
    return verified + align_coef * aligned * (1.0 - invalid) * (1.0 - wrong)


def sign_align(
    scores: AlignmentScores,
    *,
    num_groups: int,
    eps: float,
    weights: Mapping[str, float],
    align_coef: float,
    accuracy_weight: float,
    format_weight: float,
    wrong_penalty: float,
    format_penalty: float,
) -> Float[Array, "B"]:
    """Return GN(r) + align_coef · A_al · s, with s = 1 right, −1 wrong, 0 invalid.

    r = (1 − F)(w_acc · accuracy + w_fmt − p_W · W) − p_F · F. Invalid: r = −p_F whatever the
    answer, no A_al. Wrong: A_al *reversed*, so the better a wrong response looks to the
    discriminator, the lower its advantage. A group of one: r plus the signed weighted score.
    Equal r: GN(r) = 0.
    Source: PRISM verl/verl/trainer/ppo/core_algos.py:485.
    """
    aligned = _aligned(scores, num_groups, eps, weights)
    valid, wrong = 1.0 - _invalid(scores), _wrong(scores)
    reward = accuracy_weight * _accuracy(scores) + format_weight - wrong_penalty * wrong
    reward = valid * reward - format_penalty * (1.0 - valid)
    verified = group_normalise(reward, scores.prompt_id, num_groups=num_groups, eps=eps)
    return verified + align_coef * aligned * valid * (1.0 - 2.0 * wrong)


def _aligned(
    scores: AlignmentScores, num_groups: int, eps: float, weights: Mapping[str, float]
) -> Array:
    """Return A_al, after lowering invalid scores below the valid ones of their group."""
    if set(weights) != set(scores.by_segment):
        raise ValueError(
            f"weights must be of the segments {sorted(scores.by_segment)}, got {sorted(weights)}"
        )

    def normalised(name):
        values = scores.by_segment[name]
        valid = jnp.where(scores.format_ok, values, jnp.inf)
        lowest = jax.ops.segment_min(valid, scores.prompt_id, num_segments=num_groups)
        lowered = jnp.where(jnp.isfinite(lowest), lowest, 0.0)[scores.prompt_id] - 1.0
        values = jnp.where(scores.format_ok, values, lowered)
        if scores.scale is None:
            return group_normalise(values, scores.prompt_id, num_groups=num_groups, eps=eps)
        return groups.scaled(
            values,
            scores.format_ok,
            scores.prompt_id,
            None if scores.teacher is None else scores.teacher[name],
            num_groups=num_groups,
            eps=eps,
            scale=scores.scale,
        )

    return sum(weights[name] * normalised(name) for name in sorted(weights))


def _invalid(scores: AlignmentScores) -> Array:
    return 1.0 - scores.format_ok.astype(jnp.float32)


def _accuracy(scores: AlignmentScores) -> Array:
    if scores.accuracy is None:
        raise ValueError("scores.accuracy must be given for every alignment advantage but align")
    return scores.accuracy


def _wrong(scores: AlignmentScores) -> Array:
    return ((_accuracy(scores) <= 0) & scores.format_ok).astype(jnp.float32)
