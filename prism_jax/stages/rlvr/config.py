"""The configuration of RLVR: the parts of an algorithm.

    rollout    responses of a step       groups     prompts that a step learns from (DAPO)
    rewards    the judge                 overlong   cost of long responses
    advantage  comparison of rewards     algorithm  the loss
    reference  a KL term                 train      updates that follow a rollout
    adversary  a discriminator's term    distill    an open teacher's term
    held_out   when to stop

configs/rlvr.py names the algorithms of the literature, each in a few lines. A field set to `None`
is switched off.
"""

import dataclasses
from typing import Literal

from prism_jax import configuration, row_layout
from prism_jax.losses import kl
from prism_jax.policy import distill, held_out, rollouts
from prism_jax.policy import loss as policy_loss
from prism_jax.policy import update as policy_update
from prism_jax.setup import judging, prompt_mixture, row_shapes
from prism_jax.stages.rlvr import adversary_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups(configuration.Section):
    """The choice of the prompts that a step learns from.

    "all" takes the prompts as they come. Otherwise a prompt is kept when the accuracy (or the
    reward) of its responses varies, and further prompts are taken until a step is full.
    """

    keep: Literal["all", "accuracy", "reward"]
    generation_prompts: int | None  # to which the policy responds together
    max_generations: int | None  # in a step
    when_short: Literal["error", "train"]  # after them: stop, or learn from fewer groups
    # Steps for which a group that is left over is kept; 0: it is thrown away. Its responses are an
    # older policy's: their old log-probs are the sampler's, so ratio and clip count from there.
    surplus_steps: int | None

    def problems(self) -> list[str]:
        """See `Section`."""
        values = dataclasses.asdict(self)
        problems = [
            f"{name} must be None exactly when keep is 'all', got {value}"
            for name, value in values.items()
            if name not in ("keep", "when_short") and (value is None) != (self.keep == "all")
        ]
        problems += configuration.at_least(self, 1, "generation_prompts", "max_generations")
        return problems + configuration.at_least(self, 0, "surplus_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlong(configuration.Section):
    """The cost of long responses, in tokens; see `losses.advantage.overlong_penalty`."""

    buffer_tokens: int | None  # before the limit, over which the penalty rises
    penalty_factor: float | None  # at the limit
    # Truncated responses get no loss but still enter their group's statistics.
    is_filtered: bool

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.at_least(self, 1, "buffer_tokens")
        problems += configuration.at_least(self, 0, "penalty_factor")
        if (self.buffer_tokens is None) != (self.penalty_factor is None):
            problems.append("buffer_tokens and penalty_factor: both or none must be given")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advantage(configuration.Section):
    """The comparison of rewards; see `losses.advantage`."""

    kind: Literal["grpo", "dr_grpo", "rloo", "reinforce++"]
    eps: float | None  # of "grpo" and "reinforce++"
    discount: float | None  # of "reinforce++"
    # The tokens that learn from the accuracy: all, as released; those of think and answer; or
    # these, and captions half of it. See `stages.rlvr.credit`.
    credit: Literal["response", "segment", "segment_shared"]

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = []
        if (self.eps is not None) != (self.kind in ("grpo", "reinforce++")):
            problems.append(
                f"eps must be given for grpo and reinforce++ and be None for others, got {self.eps}"
            )
        if (self.discount is not None) != (self.kind == "reinforce++"):
            problems.append(
                f"discount must be given for reinforce++ and be None for others, got "
                f"{self.discount}"
            )
        if self.discount is not None and not 0 <= self.discount <= 1:
            problems.append(f"discount must be in [0, 1], got {self.discount}")
        if self.kind == "reinforce++" and self.credit != "response":
            problems.append(
                "credit must be 'response' for reinforce++, which adds up the rewards behind each "
                f"token, got {self.credit!r}"
            )
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference(configuration.Section):
    """The distance from a reference policy, in the loss, in the reward, or in both.

    With neither coefficient no reference is loaded. See `losses.kl`.
    """

    # None: the policy that the run starts from. The parameters themselves are compared.
    folder: str | None = configuration.free()
    loss_estimator: kl.LossEstimator  # see its table: k3, as released, pulls otherwise than k2
    loss_coefficient: float | None
    reward_estimator: kl.Estimator
    reward_coefficient: float | None
    reward_target: float | None  # mean KL that the coefficient is adapted to; None: it is fixed
    reward_horizon: float | None  # number of responses over which it is adapted

    @property
    def is_used(self) -> bool:
        """Return whether there is a reference."""
        return self.loss_coefficient is not None or self.reward_coefficient is not None

    @property
    def loss(self) -> policy_loss.Kl | None:
        """Return the term of the loss."""
        if self.loss_coefficient is None:
            return None
        return policy_loss.Kl(estimator=self.loss_estimator, coefficient=self.loss_coefficient)

    def problems(self) -> list[str]:
        """See `Section`."""
        values = dataclasses.asdict(self)
        problems = []
        if (self.reward_target is None) != (self.reward_horizon is None):
            problems.append("reward_target and reward_horizon: both or none must be given")
        if self.folder is not None and not self.is_used:
            problems.append(f"folder must be None without a coefficient, got {self.folder}")
        if self.reward_target is not None and self.reward_coefficient is None:
            problems.append("reward_target must be None without a reward_coefficient")
        for name in ("reward_target", "reward_horizon"):
            if values[name] is not None and not values[name] > 0:
                problems.append(f"{name} must be > 0, got {values[name]}")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(policy_update.Train):
    """The length of a run, and the updates that follow each rollout.

    The learning-rate schedule counts updates, not rollouts.
    """

    num_minibatches: int  # equal parts of a rollout's prompts, one update each
    num_epochs: int  # over a rollout

    @property
    def num_updates(self) -> int:
        """Return the updates of each step; 1 is strictly on-policy."""
        return self.num_minibatches * self.num_epochs

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.at_least(self, 1, "num_minibatches", "num_epochs")
        return super().problems() + problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.TrainingRun):
    """The configuration of RLVR."""

    prompts: prompt_mixture.Prompts
    rollout: rollouts.Rollout
    groups: Groups
    rewards: judging.Rewards
    overlong: Overlong
    advantage: Advantage
    algorithm: policy_loss.Algorithm
    reference: Reference
    adversary: adversary_config.Adversary | None  # None: there is no discriminator
    distill: distill.Distill
    rows: row_shapes.Rows
    train: Train
    held_out: held_out.HeldOut
    optim: configuration.Optim

    @property
    def generation_prompts(self) -> int:
        """Return the number of prompts to which the policy responds together."""
        num_prompts = self.groups.generation_prompts
        return self.rollout.num_prompts if num_prompts is None else num_prompts

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = super().problems() + self.held_out.problems_beside(self.prompts.path)
        rollout, parts = self.rollout, self.train.num_minibatches
        if rollout.num_prompts % parts:
            problems.append(
                f"rollout.num_prompts must divide into train.num_minibatches = {parts}, got "
                f"{rollout.num_prompts}"
            )
        if self.algorithm.loss == "reinforce" and self.train.num_updates > 1:
            problems.append(
                "algorithm.loss must have a ratio (ppo, gspo, cispo) for several updates of a "
                "rollout, got reinforce"
            )
        if self.algorithm.loss == "reinforce" and self.groups.surplus_steps:
            problems.append(
                "groups.surplus_steps must be 0 or None for the loss reinforce, which has no ratio "
                f"to an older policy, got {self.groups.surplus_steps}"
            )
        has_parts = self.adversary is None or "caption" in self.adversary.weights
        if self.advantage.credit != "response" and not has_parts:
            problems.append(
                "advantage.credit must be 'response' for an adversary whose view has no parts, "
                f"got {self.advantage.credit!r}"
            )
        buffer = self.overlong.buffer_tokens
        if buffer is not None and buffer > rollout.max_response_tokens:
            problems.append(
                "overlong.buffer_tokens must be <= rollout.max_response_tokens = "
                f"{rollout.max_response_tokens}, got {buffer}"
            )
        if self.groups.keep != "all" and rollout.num_responses < 2:
            problems.append(
                "rollout.num_responses must be >= 2 for groups that vary, got "
                f"{rollout.num_responses}"
            )
        return problems

    def problems_on(self, layout: row_layout.RowLayout) -> list[str]:
        """See `configuration.TrainingRun`."""
        sections = {"rows": self.rows}
        if self.adversary is not None:
            sections["adversary.discriminator.rows"] = self.adversary.discriminator.rows
        return [
            f"{name}.{problem}"
            for name, rows in sections.items()
            for problem in rows.problems_on(layout)
        ]
