"""The configuration of alignment."""

import dataclasses
from typing import Literal

from prism_jax import configuration, row_layout
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import config as discriminator_config
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import segments
from prism_jax.honesty import panel as honesty_panel
from prism_jax.losses import pairwise
from prism_jax.policy import loss as policy_loss
from prism_jax.policy import rollouts
from prism_jax.policy import update as policy_update
from prism_jax.rewards import tags
from prism_jax.setup import judging, prompt_mixture, row_shapes
from prism_jax.setup import models as setup_models

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
class Discriminator(configuration.Trained, discriminator_config.Pairs):
    """The discriminator: its origin, its view of a response, and its updates.

    `folder` is the workdir of `warmup` or `align`, or a folder with a score head. Types and
    attention are those of `config.model`. With `head_dropout` each update computes its scores anew.
    """

    sees_images: bool  # False: prompts are read without their pictures
    min_pixels: int | None  # of a picture, others are scaled; None: as in its folder
    max_pixels: int | None
    view: segments.View  # the segments that are scored, see `discriminator.segments`
    scored_token: segments.ScoredToken  # the token that carries the score, see there
    teacher_max_tokens: int | None  # of a segment; the rest is not read
    positions: discriminator_batch.Positions
    # None: the loss is a mean over all pairs of a step; n: over those among n responses each,
    # averaged over responses.
    microbatch_pairs: int | None
    all_invalid: pairwise.AllInvalid  # the loss of a step without a pair, see `losses.pairwise`
    rows: row_shapes.Rows
    optim: configuration.Optim

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.Trained.problems(self)
        problems += discriminator_config.Pairs.problems(self)
        problems += configuration.at_least(self, 1, "teacher_max_tokens", "microbatch_pairs")
        return problems + segments.problems_of_length("length_beta", self.length_beta, self.view)

    @property
    def form(self) -> segments.Form:
        """Return the form of segments."""
        return segments.Form(
            view=self.view,
            scored_token=self.scored_token,
            teacher_max_tokens=self.teacher_max_tokens,
        )

    def model(self, policy: configuration.Model) -> configuration.Model:
        """Return the section of the model, computed as the policy is, but trained whole."""
        return dataclasses.replace(
            policy,
            folder=self.folder,
            init=self.init,
            sizes=self.sizes,
            remat=self.remat,
            lora=configuration.NO_LORA,
        )

    def rule(self, model: setup_models.Model) -> discriminator_loss.PairRule:
        """Return the rule of the loss for this discriminator."""
        return self.pair_rule(
            model, microbatch_pairs=self.microbatch_pairs, all_invalid=self.all_invalid
        )


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
        """Return whether responses are judged."""
        return self.accuracy == "judge"

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
        if self.format_of == "judge" and not self.asks_judge:
            problems.append("format_of must be 'gate' where nothing is judged, got 'judge'")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace(configuration.Section):
    """The number of updates of each model."""

    discriminator_updates: int  # in a step, on the same responses, each from new scores
    policy_every_steps: int  # the policy is updated once in this many steps
    discriminator_warmup_steps: int  # first steps without an update of the policy

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.at_least(self, 1, "discriminator_updates", "policy_every_steps")
        return problems + configuration.at_least(self, 0, "discriminator_warmup_steps")

    def has_policy_update(self, step: int) -> bool:
        """Return whether the policy is updated in the step that follows `step` finished steps."""
        after = step - self.discriminator_warmup_steps
        return after >= 0 and after % self.policy_every_steps == 0


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

    discriminator: Discriminator
    prompts: prompt_mixture.Prompts
    gate: tags.Gate  # the format that a response must have
    rollout: rollouts.Rollout
    judge: judging.Judge  # read where `advantage.accuracy` asks the judge
    advantage: Advantage
    pace: Pace
    algorithm: Algorithm
    rows: row_shapes.Rows
    train: policy_update.Train
    honesty: honesty_panel.Options = configuration.free()
    optim: configuration.Optim

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = super().problems()
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
