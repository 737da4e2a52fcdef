"""A step of alignment, in the paper's order.

    prompts ─→ policy ─→ responses ─→ caption, cot ─┐
                 ↑                                  ├─→ discriminator ─→ scores ─→ advantages ─┐
                 │        teacher ─→ caption, cot ──┘         ↑               │                │
                 │                                            └── teacher above student       │
                 └───────────────────────── policy gradient ←──────────────────────────────────┘

`Experience` is 1 to 4, respond, cut, score and compare; `update` is 5 and 6, both models learn.
"""

import dataclasses

import jax
import numpy as np

from prism_jax import metrics
from prism_jax.discriminator import step_scores
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import distill as policy_distill
from prism_jax.policy import rollouts
from prism_jax.policy import update as policy_update
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.align import advantages as align_advantages
from prism_jax.stages.align import config as align_config
from prism_jax.stages.align import feed as align_feed
from prism_jax.stages.align import gate as align_gate
from prism_jax.stages.align import mean_weights
from prism_jax.stages.align import replay as align_replay
from prism_jax.stages.align import report as align_report
from prism_jax.stages.align import updates as align_updates
from prism_jax.stages.align.updates import State, StepBatch
from prism_jax.training import train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experience:
    """The half of a step that turns prompts into batches for both updates."""

    pace: align_config.Pace
    gate: align_gate.TeacherGate | None  # None: teachers are not judged
    replay: align_replay.Replay | None
    sampler: rollouts.Sampler
    scorer: step_scores.Scorer
    comparison: align_advantages.Comparison
    report: align_report.Report
    distill: policy_distill.Distillation | None  # None: there is no open teacher
    policy: setup_models.Model
    shapes: align_feed.Shapes
    devices: devices_lib.Devices

    def __call__(
        self, state: State, prompts: align_feed.Prompts, key: jax.Array
    ) -> tuple[StepBatch, metrics.Metrics]:
        """Return the batches for both updates, on the devices, and metrics about the responses."""
        # 1. The policy responds, several times to each prompt.
        responses = self.sampler(state["policy"].params, prompts.policy, key)
        # Steps are counted by the policy, which also counts those in which it stands still.
        step = int(state["policy"].step)
        # What the discriminator learns from may hold earlier responses too.
        earlier = None if self.replay is None else self.replay.drawn(step + 1)
        shown, answers = align_replay.joined(prompts, responses, earlier)
        is_trusted = None if self.gate is None else self.gate(shown)
        # 2, 3. Responses are cut into caption and cot, and scored before the discriminator learns
        # from them: an advantage must not depend on an update that saw the very response, and the
        # same scores then give the gradient of that update.
        scores = self.scorer(
            state["discriminator"].params,
            shown,
            answers,
            rewarding=state.get(mean_weights.NAME),
            is_trusted=is_trusted,
            num_prompts=len(prompts.rows),
        )
        if self.replay is not None:
            self.replay.add(step + 1, prompts, responses)
        if is_trusted is not None:
            is_trusted = is_trusted[: len(prompts.rows)]
        # 4. Each response is compared with the others to its prompt. The judge is off by default.
        comparison = self.comparison(scores.rewarding, prompts, responses, is_trusted)
        accuracy = step_scores.pair_accuracy(scores.by_name)
        rows, taught = None, {}
        if self.pace.has_policy_update(step, accuracy):
            rows, taught = self._policy_rows(step + 1, prompts, responses, comparison.by_token)
        batch = StepBatch(
            policy=rows,
            discriminator=scores.batch,
            places=scores.places,
            has_discriminator_update=self.pace.has_discriminator_update(accuracy),
        )
        logged = self.report(step + 1, state, prompts, responses, scores, comparison)
        return batch, logged | taught | align_gate.logged(is_trusted)

    def _policy_rows(
        self,
        step: int,
        prompts: align_feed.Prompts,
        responses: rollouts.Responses,
        advantages: np.ndarray,
    ) -> tuple[policy_batch.PolicyBatch | train_step.WithShared, metrics.Metrics]:
        """Return the rows of the policy's update on the devices, with an open teacher if any."""
        if self.distill is not None and not self.distill.has_reward:
            advantages = np.zeros_like(advantages)
        shape = self.shapes.policy
        rows = policy_update.on_policy_batch(
            prompts.policy, responses, advantages, shape, self.policy
        )
        rows = self.devices.put(rows, num_rows=shape.microbatch_rows)
        if self.distill is None:
            return rows, {}
        (taught,), logged = self.distill(step, (rows,))
        return taught, logged


def update(
    updates: align_updates.Updates,
    pace: align_config.Pace,
    state: State,
    batch: StepBatch,
    key: jax.Array,
) -> tuple[State, metrics.Metrics]:
    """Update the discriminator on (teacher, student) pairs, then the policy on its advantages."""
    # 5. The discriminator learns to put the teacher above the student.
    discriminator, segments = state["discriminator"], batch.discriminator
    num_updates = pace.discriminator_updates if batch.has_discriminator_update else 0
    discriminator_metrics = align_updates.of_skipped(discriminator) if not num_updates else {}
    for number in range(num_updates):
        update_key = jax.random.fold_in(key, number)
        # The gradients at hand are those of the scores that were just computed, without dropout. A
        # second update, or dropout, needs new scores.
        if number or updates.is_always_fresh:
            segments = updates.refresh(discriminator.params, segments, batch.places, update_key)
        discriminator, discriminator_metrics = updates.discriminator(
            discriminator, segments, update_key
        )
    # The pair loss is logged with the scores. This total only carries their gradient.
    discriminator_metrics.pop("loss/total", None)
    logged = align_updates.with_owner(discriminator_metrics, "discriminator")
    # 6. The policy learns from its advantages.
    policy = state["policy"]
    if batch.policy is None:
        policy, policy_metrics = align_updates.skip_policy(policy)
    else:
        policy, policy_metrics = updates.policy(policy, batch.policy, key)
    logged |= align_updates.with_owner(policy_metrics, "policy")
    after = {"policy": policy, "discriminator": discriminator}
    if updates.average is not None:
        # Once a step, after all updates of the discriminator, also where there was none.
        mean = updates.average(state[mean_weights.NAME], discriminator.params)
        after[mean_weights.NAME] = mean
    if pace.is_adaptive:
        logged["discriminator/is_updated"] = metrics.mean([batch.has_discriminator_update])
        logged["policy/is_updated"] = metrics.mean([batch.policy is not None])
    return after, logged
