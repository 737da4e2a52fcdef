"""The configuration of alignment."""

import dataclasses
from typing import Literal

from prism_jax import configuration, row_layout
from prism_jax.discriminator import section, segments
from prism_jax.honesty import panel as honesty_panel
from prism_jax.losses import groups
from prism_jax.policy import distill, held_out, rollouts
from prism_jax.policy import loss as policy_loss
from prism_jax.policy import update as policy_update
from prism_jax.rewards import tags
from prism_jax.setup import judging, prompt_mixture, row_shapes

Mode = Literal["align", "acc_gating", "gated_align", "rlvr", "rlvr_v2", "sign_align"]
# The numbers that each mode of the advantage reads besides weights and eps.
READS: dict[Mode, tuple[str, ...]] = {
    "align": ("format_penalty",),
    "acc_gating": ("align_coef", "wrong_penalty", "format_penalty"),
    "gated_align": ("align_coef", "wrong_penalty", "format_penalty"),
    "rlvr": ("align_coef", "accuracy_weight", "format_weight"),
    "rlvr_v2": (
        *("align_coef", "accuracy_weight", "format_weight"),
        *("wrong_penalty", "format_penalty"),
    ),
    "sign_align": (
        *("align_coef", "accuracy_weight", "format_weight"),
        *("wrong_penalty", "format_penalty"),
    ),
}
_NUMBERS = ("align_coef", "accuracy_weight", "format_weight", "wrong_penalty", "format_penalty")

# Source: PRISM verl/verl/trainer/config/actor/actor.yaml: clip_ratio.
_CLIP = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advantage(configuration.Section):
    """A function of `losses.advantage` and its numbers; a number that it does not read is None."""

    mode: Mode
    caption_weight: float | None  # of the segments of the view; None for any other
    cot_weight: float | None
    response_weight: float | None
    # The tokens that get a segment's advantage, see `advantages.weights_by_part`: all of the
    # response, as released; those of the segment; or these, and captions also half of the cot's.
    credit: Literal["response", "segment", "segment_shared"]
    # The scale of normalised scores, see `losses.groups`; "group" is the released one.
    scale: groups.Kind
    std_floor: float | None  # least deviation that divides; None: any
    # The judge's word on the teacher's answer to each prompt: not asked for; or, where it is
    # wrong, nothing is learned from the prompt; or the policy learns from the judge instead of
    # from scores (GRPO). The discriminator learns from right teachers alone. arXiv 2609.02998.
    teacher_gate: Literal["off", "drop", "verify"]
    eps: float
    align_coef: float | None
    accuracy_weight: float | None
    format_weight: float | None
    wrong_penalty: float | None
    format_penalty: float | None
    # The source of the accuracy: "judge", or "nobody", and then no answer is wrong, as in the
    # released code of gated_align. "off" for align, which does not read it.
    accuracy: Literal["off", "judge", "nobody"]
    # Which format check decides validity: the gate's (it also chooses the scored responses), or,
    # as in the release, the judge's. The judge may accept a response the gate rejects; it then
    # counts as valid with score 0.
    format_of: Literal["gate", "judge"]

    @property
    def weights(self) -> dict[str, float]:
        """Return the weights by segment."""
        weights = {
            "caption": self.caption_weight,
            "cot": self.cot_weight,
            "response": self.response_weight,
        }
        return {name: weight for name, weight in weights.items() if weight is not None}

    @property
    def asks_judge(self) -> bool:
        """Return whether answers are judged, the policy's or the teacher's."""
        return self.accuracy == "judge" or self.teacher_gate != "off"

    @property
    def scores_scale(self) -> groups.Scale | None:
        """Return the scale of scores; None: the released one."""
        if self.scale == "group" and self.std_floor is None:
            return None
        return groups.Scale(kind=self.scale, floor=self.std_floor)

    def problems(self) -> list[str]:
        """See `Section`."""
        weights = ("caption_weight", "cot_weight", "response_weight")
        problems = configuration.at_least(self, 0, "eps", *weights, *_NUMBERS)
        values, reads = dataclasses.asdict(self), READS[self.mode]
        problems += [
            f"{name} must be {'given' if name in reads else 'None'} for {self.mode}, "
            f"got {values[name]}"
            for name in _NUMBERS
            if (values[name] is not None) != (name in reads)
        ]
        if (self.accuracy == "off") != (self.mode == "align"):
            problems.append(
                "accuracy must be 'off' for align and 'judge' or 'nobody' for any other mode, "
                f"got {self.accuracy!r} for {self.mode}"
            )
        if self.format_of == "judge" and self.accuracy != "judge":
            problems.append("format_of must be 'gate' where nothing is judged, got 'judge'")
        if self.teacher_gate != "off" and self.accuracy == "nobody":
            problems.append(
                f"teacher_gate must be 'off' where nobody judges, got {self.teacher_gate!r}"
            )
        if self.std_floor is not None and not self.std_floor > 0:
            problems.append(f"std_floor must be > 0 or None, got {self.std_floor}")
        if self.std_floor is not None and self.scale == "none":
            problems.append("std_floor must be None for the scale 'none', which divides by nothing")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace(configuration.Section):
    """The number of updates of each model."""

    discriminator_updates: int  # in a step, on the same responses, each from new scores
    policy_every_steps: int  # the policy is updated once in this many steps
    discriminator_warmup_steps: int  # first steps without an update of the policy
    # By the step's pair accuracy, a mean over segments: a discriminator above the first is not
    # updated, nor is the policy below the second, whose rewards would say little. None: always.
    discriminator_max_accuracy: float | None
    policy_min_accuracy: float | None

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.at_least(self, 1, "discriminator_updates", "policy_every_steps")
        for name in ("discriminator_max_accuracy", "policy_min_accuracy"):
            value = dataclasses.asdict(self)[name]
            if value is not None and not 0 <= value <= 1:
                problems.append(f"{name} must be in [0, 1] or None, got {value}")
        return problems + configuration.at_least(self, 0, "discriminator_warmup_steps")

    @property
    def is_adaptive(self) -> bool:
        """Return whether updates depend on the discriminator's accuracy."""
        return self.discriminator_max_accuracy is not None or self.policy_min_accuracy is not None

    def has_policy_update(self, step: int, accuracy: float | None = None) -> bool:
        """Return whether the policy is updated in the step that follows `step` finished steps.

        Args:
          accuracy: of the step's pairs; None: there are none.
        """
        after = step - self.discriminator_warmup_steps
        is_low = (
            self.policy_min_accuracy is not None
            and accuracy is not None
            and accuracy < self.policy_min_accuracy
        )
        return after >= 0 and after % self.policy_every_steps == 0 and not is_low

    def has_discriminator_update(self, accuracy: float | None) -> bool:
        """Return whether the discriminator is updated in a step with this accuracy of pairs."""
        most = self.discriminator_max_accuracy
        return most is None or accuracy is None or accuracy <= most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm(policy_loss.Weighing):
    """The weights of response tokens in the policy's loss.

    One update follows each rollout, so every ratio is 1 and no clip binds: none is configured.
    """

    def loss(self) -> policy_loss.Algorithm:
        """Return the loss, in the released form."""
        return policy_loss.Algorithm(
            loss="ppo",
            clip_low=_CLIP,
            clip_high=_CLIP,
            dual_clip=None,
            aggregation=self.aggregation,
            norm_tokens=self.norm_tokens,
            sampler_weights=self.sampler_weights,
            sampler_level=self.sampler_level,
            sampler_low=self.sampler_low,
            sampler_high=self.sampler_high,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.TrainingRun):
    """The configuration of alignment; `model` is the policy."""

    discriminator: section.Discriminator
    prompts: prompt_mixture.Prompts
    gate: tags.Gate  # the format that a response must have
    rollout: rollouts.Rollout
    judge: judging.Judge  # read where `advantage.accuracy` asks the judge
    advantage: Advantage
    pace: Pace
    algorithm: Algorithm
    distill: distill.Distill
    rows: row_shapes.Rows
    train: policy_update.Train
    honesty: honesty_panel.Options = configuration.free()
    held_out: held_out.HeldOut
    optim: configuration.Optim

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = super().problems() + self.held_out.problems_beside(self.prompts.path)
        names = segments.VIEWS[self.discriminator.view]
        if set(self.advantage.weights) != set(names):
            problems.append(
                f"advantage must have a weight for each of {', '.join(names)}, the segments of the "
                f"view {self.discriminator.view}, got {', '.join(self.advantage.weights)}"
            )
        if self.advantage.credit != "response" and "caption" not in names:
            problems.append(
                "advantage.credit must be 'response' for the view "
                f"{self.discriminator.view}, which has no parts, got {self.advantage.credit!r}"
            )
        size = self.discriminator.microbatch_pairs
        replayed = self.discriminator.steadying.replay_prompts
        if replayed is not None and replayed > self.rollout.num_prompts:
            problems.append(
                "discriminator.steadying.replay_prompts must be <= rollout.num_prompts = "
                f"{self.rollout.num_prompts}, got {replayed}"
            )
        if replayed is not None and size is not None:
            problems.append(
                "discriminator.microbatch_pairs must be None with steadying.replay_prompts, "
                f"got {size}"
            )
        num_responses = self.rollout.num_prompts * self.rollout.num_responses
        if size is not None and num_responses % size:
            problems.append(
                "discriminator.microbatch_pairs must divide the responses of a step, "
                f"{num_responses}, got {size}"
            )
        return problems

    def problems_on(self, layout: row_layout.RowLayout) -> list[str]:
        """See `configuration.TrainingRun`."""
        sections = {"rows": self.rows, "discriminator.rows": self.discriminator.rows}
        return [
            f"{name}.{problem}"
            for name, rows in sections.items()
            for problem in rows.problems_on(layout)
        ]
