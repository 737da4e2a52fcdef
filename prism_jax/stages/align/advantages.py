"""From scores to advantages: the mode is chosen here, and the judge asked where it counts."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax import metrics
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.losses import advantage, pairwise
from prism_jax.policy import responses, rollouts
from prism_jax.rewards import workers
from prism_jax.stages.align import config as align_config
from prism_jax.stages.align import feed as align_feed


def make_advantages(
    options: align_config.Config,
) -> Callable[[discriminator_loss.ByName, jax.Array, jax.Array | None], jax.Array]:
    """Return the jitted (scores, format_ok, accuracy) -> advantages, float32[responses].

    Scores count as the pair loss reads them: corrected for length, then clipped.
    """
    rollout, own = options.rollout, options.discriminator
    prompt_id = np.repeat(np.arange(rollout.num_prompts, dtype=np.int32), rollout.num_responses)
    compare = chosen(options.advantage, num_groups=rollout.num_prompts)
    betas = dict(own.length_beta)

    def advantages(
        found: discriminator_loss.ByName, format_ok: jax.Array, accuracy: jax.Array | None
    ) -> jax.Array:
        by_segment = {}
        for name, one in found.items():
            # Not rounded again: the released rewards leave bfloat16 right behind the head.
            _, student = pairwise.ready(
                one.segment(),
                beta=betas.get(name),
                score_clip=own.score_clip,
                score_dtype="float32",
            )
            # A response that was not scored but counts as valid has the released score of 0.
            by_segment[name] = jnp.where(one.is_pair, student, 0.0)
        return compare(
            advantage.AlignmentScores(
                prompt_id=jnp.asarray(prompt_id),
                by_segment=by_segment,
                format_ok=format_ok,
                accuracy=accuracy,
            )
        )

    return jax.jit(advantages)


def chosen(
    options: align_config.Advantage, *, num_groups: int
) -> Callable[[advantage.AlignmentScores], jax.Array]:
    """Return the advantage of `config.advantage.mode`: the one place where it is chosen."""
    shared = {"num_groups": num_groups, "eps": options.eps, "weights": options.weights}
    if options.mode == "align":
        return functools.partial(advantage.align, **shared, format_penalty=options.format_penalty)
    shared["align_coef"] = options.align_coef
    penalties = {
        "wrong_penalty": options.wrong_penalty,
        "format_penalty": options.format_penalty,
    }
    if options.mode == "acc_gating":
        return functools.partial(advantage.acc_gating, **shared, **penalties)
    if options.mode == "gated_align":
        return functools.partial(advantage.gated_align, **shared, **penalties)
    shared |= {
        "accuracy_weight": options.accuracy_weight,
        "format_weight": options.format_weight,
    }
    if options.mode == "rlvr":
        return functools.partial(advantage.rlvr, **shared)
    if options.mode == "rlvr_v2":
        return functools.partial(advantage.rlvr_v2, **shared, **penalties)
    return functools.partial(advantage.sign_align, **shared, **penalties)


def verify(
    options: align_config.Config,
    judge: workers.JudgePool | None,
    asked: align_feed.Asked,
    drawn: rollouts.Drawn,
) -> tuple[np.ndarray, np.ndarray | None, metrics.Metrics]:
    """Return whose format counts as right, the accuracy that the advantage reads, and metrics."""
    own = options.advantage
    format_ok = np.array([one.format_ok for one in drawn.segments])
    if own.accuracy == "off":
        return format_ok, None, {}
    if own.accuracy == "nobody":
        return format_ok, np.ones(len(format_ok), np.float32), {}
    begun = time.monotonic()
    tasks = responses.tasks(asked.rows, drawn.segments, num_responses=options.rollout.num_responses)
    rewards = judge.grade(tasks)
    accuracy = np.array([reward.accuracy for reward in rewards], np.float32)
    if own.format_of == "judge":
        format_ok = np.array([reward.format > 0 for reward in rewards])
    told = {
        "reward/accuracy_mean": metrics.mean(accuracy),
        "time/judge_seconds": metrics.mean([time.monotonic() - begun]),
    }
    return format_ok, accuracy, told
