"""The configuration of alignment."""

import dataclasses
from typing import Literal

from prism_jax import configuration, row_layout
from prism_jax.discriminator import batch as discriminator_batch
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
# What each mode of the advantage reads besides weights and eps.
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
class Discriminator(configuration.Section):
    """Say which discriminator scores, what it sees, and how it learns.

    Types and attention are those of `config.model`.
    """

    # Workdir of `warmup` or `align`, or a folder with a score head.
    folder: str = configuration.free()
    init: Literal["pretrained", "random"]
    sizes: configuration.Sizes | None  # exactly when init is "random"
    remat: Literal["none", "full", "save_attention", "save_attention_and_dots"]
    sees_images: bool  # False: prompts are read without their pictures
    min_pixels: int | None  # of a picture, others are scaled; None: as its folder says
    max_pixels: int | None
    view: segments.View  # which segments it scores, see `discriminator.segments`
    scored_token: segments.ScoredToken  # where a segment is scored, see `discriminator.segments`
    teacher_max_tokens: int | None  # of a segment; the rest is not read
    positions: discriminator_batch.Positions
    score_clip: float | None
    length_beta: tuple[tuple[str, float], ...]  # segment, coefficient: see `correct_length`
    regulariser: float
    router: float  # coefficient of the router's load balance; of no effect without experts
    score_dtype: pairwise.ScoreDtype  # of the head and of the loss, see `losses.pairwise`
    head_dropout: float  # while learning; each update then computes its scores anew
    # None: the loss is a mean over all pairs of a step; n: over those among n responses each,
    # averaged over responses.
    microbatch_pairs: int | None
    all_invalid: pairwise.AllInvalid  # what a step without a pair teaches, see `losses.pairwise`
    rows: row_shapes.Rows
    optim: configuration.Optim

    def problems(self) -> list[str]:
        """See `Section`."""
        found = configuration.not_empty(self, "folder")
        found += configuration.at_least(self, 0, "regulariser", "router")
        if (self.sizes is not None) != (self.init == "random"):
            found.append("sizes must be given exactly when init is 'random'")
        if self.score_clip is not None and not self.score_clip > 0:
            found.append(f"score_clip must be > 0 or None, got {self.score_clip}")
        if not 0 <= self.head_dropout < 1:
            found.append(f"head_dropout must be in [0, 1), got {self.head_dropout}")
        found += configuration.at_least(self, 1, "teacher_max_tokens", "microbatch_pairs")
        return found + segments.problems_of_length("length_beta", self.length_beta, self.view)

    @property
    def form(self) -> segments.Form:
        """Return how segments are cut."""
        return segments.Form(
            view=self.view,
            scored_token=self.scored_token,
            teacher_max_tokens=self.teacher_max_tokens,
        )

    def model(self, policy: configuration.Model) -> configuration.Model:
        """Return the section of the model, computed as the policy is."""
        return dataclasses.replace(
            policy, folder=self.folder, init=self.init, sizes=self.sizes, remat=self.remat
        )

    def rule(self, model: setup_models.Model) -> discriminator_loss.PairRule:
        """Return the numbers of the pair loss for this discriminator."""
        return discriminator_loss.PairRule(
            score_clip=self.score_clip,
            regulariser=self.regulariser,
            router=self.router if model.config.text.moe is not None else 0.0,
            length_beta=self.length_beta,
            microbatch_pairs=self.microbatch_pairs,
            all_invalid=self.all_invalid,
            score_dtype=self.score_dtype,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advantage(configuration.Section):
    """Name a function of `losses.advantage` and its numbers; what it does not read is None."""

    mode: Mode
    caption_weight: float | None  # of the segments of the view; None for one that it has not
    cot_weight: float | None
    response_weight: float | None
    # Which tokens a segment's advantage teaches, see `advantages.weights_by_part`: all of the
    # response, as released; its own; or its own, and the caption's also half of the cot's.
    credit: Literal["response", "segment", "segment_shared"]
    eps: float
    align_coef: float | None
    accuracy_weight: float | None
    format_weight: float | None
    wrong_penalty: float | None
    format_penalty: float | None
    # Who says whether an answer is right: "judge", or "nobody", and then none is wrong, as in the
    # released code of gated_align. "off" for align, which does not ask.
    accuracy: Literal["off", "judge", "nobody"]
    # Whose format counts: that of the gate, which also says what is scored; or the judge's own, as
    # released: where that one is looser, a response counts as valid with scores of 0.
    format_of: Literal["gate", "judge"]

    @property
    def weights(self) -> dict[str, float]:
        """Return the weights by segment."""
        every = {
            "caption": self.caption_weight,
            "cot": self.cot_weight,
            "response": self.response_weight,
        }
        return {name: weight for name, weight in every.items() if weight is not None}

    @property
    def asks_judge(self) -> bool:
        """Tell whether responses are judged."""
        return self.accuracy == "judge"

    def problems(self) -> list[str]:
        """See `Section`."""
        weights = ("caption_weight", "cot_weight", "response_weight")
        found = configuration.at_least(self, 0, "eps", *weights, *_NUMBERS)
        values, reads = dataclasses.asdict(self), READS[self.mode]
        found += [
            f"{name} must be {'given' if name in reads else 'None'} for {self.mode}, "
            f"got {values[name]}"
            for name in _NUMBERS
            if (values[name] is not None) != (name in reads)
        ]
        if (self.accuracy == "off") != (self.mode == "align"):
            found.append(
                "accuracy must be 'off' for align and 'judge' or 'nobody' for any other mode, "
                f"got {self.accuracy!r} for {self.mode}"
            )
        if self.format_of == "judge" and not self.asks_judge:
            found.append("format_of must be 'gate' where no judge is asked, got 'judge'")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace(configuration.Section):
    """Say how often each model learns."""

    discriminator_updates: int  # in a step, on the same responses, each from new scores
    policy_every_steps: int  # the policy learns in one of so many steps
    discriminator_warmup_steps: int  # first steps in which the policy stands still

    def problems(self) -> list[str]:
        """See `Section`."""
        found = configuration.at_least(self, 1, "discriminator_updates", "policy_every_steps")
        return found + configuration.at_least(self, 0, "discriminator_warmup_steps")

    def has_policy_update(self, step: int) -> bool:
        """Tell whether the policy learns in the step after so many finished ones."""
        after = step - self.discriminator_warmup_steps
        return after >= 0 and after % self.policy_every_steps == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm(configuration.Section):
    """Say how the tokens of responses are weighed, see `policy.loss.Algorithm`.

    One update follows each rollout, so every ratio is 1 and no clip binds: there is none to choose.
    """

    aggregation: policy_loss.Aggregation
    norm_tokens: int | None
    sampler_weights: Literal["off", "truncate", "mask"]
    sampler_level: Literal["token", "sequence"]
    sampler_low: float | None
    sampler_high: float | None

    def problems(self) -> list[str]:
        """See `Section`."""
        return self.loss().problems()

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
        found = super().problems()
        names = segments.VIEWS[self.discriminator.view]
        if set(self.advantage.weights) != set(names):
            found.append(
                f"advantage must have a weight for each of {', '.join(names)}, the segments of the "
                f"view {self.discriminator.view}, got {', '.join(self.advantage.weights)}"
            )
        if self.advantage.credit != "response" and "caption" not in names:
            found.append(
                "advantage.credit must be 'response' for the view "
                f"{self.discriminator.view}, which has no parts, got {self.advantage.credit!r}"
            )
        size = self.discriminator.microbatch_pairs
        num_responses = self.rollout.num_prompts * self.rollout.num_responses
        if size is not None and num_responses % size:
            found.append(
                "discriminator.microbatch_pairs must divide the responses of a step, "
                f"{num_responses}, got {size}"
            )
        return found

    def problems_on(self, layout: row_layout.RowLayout) -> list[str]:
        """See `configuration.TrainingRun`."""
        sections = {"rows": self.rows, "discriminator.rows": self.discriminator.rows}
        return [
            f"{name}.{problem}"
            for name, rows in sections.items()
            for problem in rows.problems_on(layout)
        ]
