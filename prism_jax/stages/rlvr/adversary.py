"""The adversarial term of RLVR: a discriminator's advantages beside those of the reward.

    groups ─→ reward ─→ advantages of the algorithm ──────────────────┐
       │                                                              ├─→ advantages of the tokens
       └─→ caption, cot ─→ discriminator ─→ scores ─→ coefficient × ──┘
                                  ↑               └─→ teacher above student: its update

Every algorithm takes the sum; which groups are learned from, penalties, the KL and the loss stay
its own. Scores are compared within the group as in alignment, malformed responses below the others.
The coefficient falls linearly to its end; once it is 0 the discriminator is neither called nor
updated. So alignment and verification can run as one stage, the first handing over to the second.
Source: arXiv 2607.01181: a discriminator's reward beside the judge's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.inputs import Example
from prism_jax import metrics
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import opening, segments, step_scores
from prism_jax.losses import advantage, groups
from prism_jax.losses import credit as credit_lib
from prism_jax.policy import credit as policy_credit
from prism_jax.policy import rollouts
from prism_jax.rollout import engine
from prism_jax.stages.rlvr import adversary_config
from prism_jax.stages.rlvr import groups as rlvr_groups
from prism_jax.training import train_state, train_step

State = dict[str, train_state.TrainState]  # "policy" and "discriminator"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shown:
    """The prompts of a step's groups, as the discriminator reads them."""

    discriminator: list[Example]
    teachers: list[segments.Cut]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """The adversarial part of a step."""

    advantages: np.ndarray | None  # float32[N] or [N, T], times the coefficient; None: 0
    batch: discriminator_batch.SegmentBatch | None  # None: the discriminator stands still
    places: step_scores.Places
    metrics: metrics.Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The batches of a step for both models."""

    policy: Any
    discriminator: discriminator_batch.SegmentBatch | None
    places: step_scores.Places


class Scoring:
    """The scores of a step's groups, and the advantages that follow."""

    def __init__(
        self,
        options: adversary_config.Adversary,
        cutter: opening.Cutter,
        scorer: step_scores.Scorer,
        *,
        credit: credit_lib.Credit,
    ):
        self._options, self._cutter, self._scorer = options, cutter, scorer
        self._compare = make_compare(options, credit)

    def __call__(self, step: int, state: State, filled: Sequence[rlvr_groups.Group]) -> Scored:
        """Return the adversarial part of the step of this number, counted from 1."""
        coefficient = self._options.coefficient_at(step)
        logged = {"reward/adversarial_coefficient": metrics.mean([coefficient])}
        if coefficient == 0 or not filled:
            return Scored(advantages=None, batch=None, places={}, metrics=logged)
        rows = [group.row for group in filled]
        shown = _Shown(
            discriminator=self._cutter.prompts(rows), teachers=self._cutter.teachers(rows)
        )
        responses = responses_of(filled)
        scores = self._scorer(
            state["discriminator"].params, shown, responses, num_prompts=len(rows)
        )
        format_ok = np.array([one.format_ok for one in responses.segments])
        by_part = jax.device_get(self._compare(scores.rewarding, format_ok))
        advantages = coefficient * policy_credit.of_parts(by_part, responses)
        logged["reward/adversarial_advantage_absolute_mean"] = metrics.mean(
            np.abs(by_part["response"])
        )
        return Scored(
            advantages=advantages.astype(np.float32),
            batch=scores.batch,
            places=scores.places,
            metrics=logged | scores.metrics,
        )


def responses_of(filled: Sequence[rlvr_groups.Group]) -> rollouts.Responses:
    """Return the responses of groups, those to one prompt side by side."""
    responses = [response for group in filled for response in group.responses]
    lengths = np.array([len(response.tokens) for response in responses], np.int32)
    tokens = np.zeros((len(responses), lengths.max()), np.int32)
    for number, response in enumerate(responses):
        tokens[number, : lengths[number]] = response.tokens
    rollout = engine.Rollout(
        tokens=tokens,
        logprobs=np.zeros(tokens.shape, np.float32),
        lengths=lengths,
        ended=np.array([response.segments.ended for response in responses], bool),
    )
    return rollouts.Responses(
        rollout=rollout,
        segments=[response.segments for response in responses],
        num_prompts=len(filled),
        seconds=0.0,
    )


def make_compare(
    options: adversary_config.Adversary, credit: credit_lib.Credit
) -> Callable[[discriminator_loss.ByName, np.ndarray], dict[str, jax.Array]]:
    """Return the jitted (scores, format_ok) -> advantages by part, see `losses.credit`."""
    section = options.discriminator
    scale = groups.Scale(kind=options.scale, floor=options.std_floor)

    def compare(scores: discriminator_loss.ByName, format_ok: jax.Array) -> dict[str, jax.Array]:
        of_teacher, by_segment = section.corrected_scores(scores)
        num_groups = len(next(iter(scores.values())).teacher)
        inputs = advantage.AlignmentScores(
            prompt_id=jnp.repeat(jnp.arange(num_groups), len(format_ok) // num_groups),
            by_segment=by_segment,
            format_ok=format_ok,
            accuracy=None,
            teacher=of_teacher,
            scale=scale,
        )
        return {
            part: advantage.align(
                inputs, num_groups=num_groups, eps=options.eps, weights=weights, format_penalty=0.0
            )
            for part, weights in credit_lib.weights_by_part(credit, options.weights).items()
        }

    return jax.jit(compare)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Updates:
    """The updates of both models."""

    policy: Callable[[Any, Any, jax.Array], tuple[Any, metrics.Metrics]]
    discriminator: train_step.TrainStep
    # (parameters, batch, places, key) -> the batch with the gradients of scores as they are now
    refresh: Callable[..., discriminator_batch.SegmentBatch]
    num_updates: int  # of the discriminator
    is_always_fresh: bool

    def __call__(
        self, state: State, batch: StepBatch, key: jax.Array
    ) -> tuple[State, metrics.Metrics]:
        """Update the discriminator on its pairs, and the policy on the sum of advantages."""
        discriminator, learned = state["discriminator"], batch.discriminator
        logged = {
            "optim/discriminator_skipped_in_row": metrics.Mean(
                total=jnp.copy(discriminator.opt_state.num_skipped_in_row), weight=jnp.ones(())
            )
        }
        for number in range(0 if learned is None else self.num_updates):
            update_key = jax.random.fold_in(key, number)
            # The scores at hand are those before the first update, without dropout.
            if number or self.is_always_fresh:
                learned = self.refresh(discriminator.params, learned, batch.places, update_key)
            discriminator, learned_metrics = self.discriminator(discriminator, learned, update_key)
            # The pair loss is logged with the scores; this total only carries their gradient.
            del learned_metrics["loss/total"]
            logged = {
                name.replace("optim/", "optim/discriminator_", 1): metric
                for name, metric in learned_metrics.items()
            }
        policy, policy_metrics = self.policy(state["policy"], batch.policy, key)
        return {"policy": policy, "discriminator": discriminator}, logged | policy_metrics
