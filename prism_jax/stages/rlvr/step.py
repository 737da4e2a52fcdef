"""A step of RLVR, in the paper's order.

    prompts ─→ policy ─→ responses ─→ judge ─→ rewards ─→ advantages ─→ updates of the policy
       ↑                                 │                    ↑              ↑
       └── until enough groups vary ─────┘                    └─ reference policy ─┘   (off)

`Experience` is 1 to 6: respond, judge, fill, reward, compare, pack. `update` is 7, the policy
learns.
"""

import dataclasses

import jax

from prism_jax import metrics
from prism_jax.policy import distill as policy_distill
from prism_jax.stages.rlvr import advantages as rlvr_advantages
from prism_jax.stages.rlvr import adversary as rlvr_adversary
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import credit
from prism_jax.stages.rlvr import feed as rlvr_feed
from prism_jax.stages.rlvr import groups as rlvr_groups
from prism_jax.stages.rlvr import packing as rlvr_packing
from prism_jax.stages.rlvr import report as rlvr_report
from prism_jax.stages.rlvr import sampling as rlvr_sampling
from prism_jax.stages.rlvr import updates as rlvr_updates
from prism_jax.stages.rlvr.carry import Carry
from prism_jax.stages.rlvr.updates import Batches
from prism_jax.training import train_state, train_step

# Of the policy; with an adversary of both models by name.
State = train_state.TrainState | rlvr_adversary.State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experience:
    """The half of a step that turns prompts into the batches of its updates."""

    options: rlvr_config.Config
    feed: rlvr_feed.Feed
    sampling: rlvr_sampling.Sampling
    packer: rlvr_packing.Packer
    comparison: rlvr_advantages.Comparison
    report: rlvr_report.Report
    adversary: rlvr_adversary.Scoring | None = None  # None: there is no discriminator
    distill: policy_distill.Distillation | None = None  # None: there is no open teacher

    def __call__(
        self, state: State, prompts: rlvr_groups.Prompts | None, key: jax.Array
    ) -> tuple[Batches | rlvr_adversary.StepBatch, metrics.Metrics]:
        """Return the batches of the updates, on the devices, and metrics about the responses."""
        policy = state if self.adversary is None else state["policy"]
        # The policy counts updates, of which a step has several.
        step = int(policy.step) // self.options.train.num_updates + 1
        # 1, 2. The policy responds, several times to each prompt, and the judge rewards each
        # response. 3. With `groups.keep` both repeat until enough groups vary, since a group
        # without variation has no advantage.
        filled, sampling_metrics = self.sampling(policy.params, prompts, self.feed, key, step=step)
        responses = rlvr_groups.flatten(filled.groups, step=step)
        # 4. The reward is the judge's, less a penalty on length, less the distance from the
        # reference policy. The rows come before the advantages for its sake: the log-probs of both
        # policies are computed over packed rows, and then used again by the loss.
        packed = self.packer(policy.params, filled.groups)
        penalties = self.comparison.penalties(responses.lengths)
        distance = self.packer.distance(packed, responses, self.feed.carry.coefficient)
        # 5. Each response is compared with the others to its prompt.
        comparison = self.comparison(
            responses.rewards + penalties,
            responses.prompt_id,
            responses.lengths,
            distance=distance,
            parts=credit.parts_of(
                responses,
                self.options.advantage,
                accuracy_weight=self.options.rewards.accuracy_weight,
            ),
        )
        advantages, scored = comparison.advantages, None
        if self.distill is not None and not self.distill.has_reward:
            advantages = 0 * advantages
        # Those of a discriminator are added, whatever is compared.
        if self.adversary is not None:
            scored = self.adversary(step, state, filled.groups)
            advantages = credit.summed(advantages, scored.advantages)
        # 6. Each response token gets its advantage. Groups that are left over wait for the next
        # step.
        batches = self.packer.finish(packed, responses, advantages)
        if self.distill is not None:
            # An open teacher reads the same rows within the updates.
            batches, logged = self.distill(step, batches)
            sampling_metrics |= logged
        self.feed.carry = Carry(
            groups=tuple(filled.surplus), coefficient=comparison.next_coefficient
        )
        logged = self.report(step, filled, responses, penalties, comparison)
        logged = sampling_metrics | packed.metrics | logged
        if scored is None:
            return batches, logged
        both = rlvr_adversary.StepBatch(
            policy=batches, discriminator=scored.batch, places=scored.places
        )
        return both, logged | scored.metrics


def update(
    train: train_step.TrainStep,
    state: train_state.TrainState,
    batches: Batches,
    key: jax.Array,
    *,
    num_epochs: int,
) -> tuple[train_state.TrainState, metrics.Metrics]:
    """Update the policy on each part of the step, in order, `num_epochs` times."""
    # 7. The policy learns. One update is strictly on-policy; the ratio of several is that to the
    # policy before the first of them.
    if len(batches) * num_epochs == 1:
        return train(state, batches[0], key)
    updates = []
    for number in range(len(batches) * num_epochs):
        update_key = jax.random.fold_in(key, number)
        state, logged = train(state, batches[number % len(batches)], update_key)
        updates.append(logged)
    return state, rlvr_updates.merge(updates)
