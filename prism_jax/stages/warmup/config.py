"""The configuration of the warm-up; configs/warmup.py gives the values."""

import dataclasses
from typing import Literal

from prism_jax import configuration, row_layout
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import segments
from prism_jax.honesty import panel as honesty_panel
from prism_jax.losses import pairwise
from prism_jax.rewards import tags
from prism_jax.setup import models as setup_models
from prism_jax.setup import row_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(configuration.Section):
    """Say which pairs, and how the discriminator reads them."""

    # JSONL files, folders of them, or folders that `data build` wrote; the pairs themselves are
    # compared.
    train: tuple[str, ...] = configuration.free()
    held_out_fraction: float  # of the prompts, for evaluation; a prompt is on one side only
    # Of relative image paths; empty: the folder of the file.
    image_root: str = configuration.free()
    cache_dir: str = configuration.free()  # for built data sets on gs://
    max_bad_rows: int
    overlong: Literal["error", "filter"]  # what happens to longer rows
    max_tokens: int  # of a prompt with one segment
    min_pixels: int | None  # of a picture, others are scaled; None: as the model's folder says
    max_pixels: int | None
    limit_image_pixels: int  # of a picture's file; a larger one is a wrong row
    sees_images: bool  # False: prompts are read without their pictures
    # Folder of tokenizer and chat template; empty: the model's. A text-only trunk needs that of the
    # policy, whose texts it is to score.
    words: str = configuration.free()
    view: segments.View  # which segments there are
    # Where a segment is scored, see `discriminator.segments`.
    scored_token: Literal["last", "newline"]
    gate: tags.Gate  # the format that a response must have
    num_threads: int = configuration.free()

    @property
    def form(self) -> segments.Form:
        """Return how segments are cut."""
        return segments.Form(
            view=self.view, scored_token=self.scored_token, teacher_max_tokens=None
        )

    def problems(self) -> list[str]:
        """See `Section`."""
        found = configuration.not_empty(self, "train")
        found += configuration.at_least(self, 1, "max_tokens", "num_threads")
        if not 0 <= self.held_out_fraction < 1:
            found.append(f"held_out_fraction must be in [0, 1), got {self.held_out_fraction}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(configuration.Section):
    """Hold the numbers of the loss; see `discriminator.loss.PairRule`."""

    score_clip: float | None
    regulariser: float
    router: float  # of no effect without experts
    length_beta: tuple[tuple[str, float], ...]  # segment, coefficient: see `correct_length`
    score_dtype: pairwise.ScoreDtype  # of the head and of the loss, see `losses.pairwise`
    head_dropout: float  # while learning

    def problems(self) -> list[str]:
        """See `Section`."""
        found = configuration.at_least(self, 0, "regulariser", "router")
        if self.score_clip is not None and not self.score_clip > 0:
            found.append(f"score_clip must be > 0 or None, got {self.score_clip}")
        if not 0 <= self.head_dropout < 1:
            found.append(f"head_dropout must be in [0, 1), got {self.head_dropout}")
        return found

    def is_split_seen(self, model: setup_models.Model) -> bool:
        """Return whether the training depends on the split of a step into microbatches."""
        return self.rule(model).router > 0 or self.head_dropout > 0

    def rule(self, model: setup_models.Model) -> discriminator_loss.PairRule:
        """Return the rule for this discriminator."""
        has_router = model.config.text.moe is not None
        return discriminator_loss.PairRule(
            score_clip=self.score_clip,
            regulariser=self.regulariser,
            router=self.router if has_router else 0.0,
            length_beta=self.length_beta,
            microbatch_pairs=None,
            all_invalid="none",
            score_dtype=self.score_dtype,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(configuration.Section):
    """Say how long."""

    num_steps: int | None  # exactly one of the two is given
    num_epochs: int | None
    num_pairs: int  # of responses in a step; each gives a pair of every segment of the view
    max_skipped_in_row: int  # updates that are not finite before the run is given up

    def problems(self) -> list[str]:
        """See `Section`."""
        found = configuration.at_least(
            self, 1, "num_steps", "num_epochs", "num_pairs", "max_skipped_in_row"
        )
        if (self.num_steps is None) == (self.num_epochs is None):
            found.append("num_steps and num_epochs: exactly one must be given")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(configuration.Section):
    """Say when held-out pairs are scored."""

    every_steps: int | None  # None: never
    num_batches: int | None  # of `train.num_pairs`; None: all

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 1, "every_steps", "num_batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.TrainingRun):
    """The configuration of the warm-up."""

    data: Data
    pairs: Pairs
    rows: row_shapes.Rows
    train: Train
    evaluate: Evaluate = configuration.free()
    honesty: honesty_panel.Options = configuration.free()
    optim: configuration.Optim

    def problems(self) -> list[str]:
        """See `Section`."""
        return super().problems() + segments.problems_of_length(
            "pairs.length_beta", self.pairs.length_beta, self.data.view
        )

    def problems_on(self, layout: row_layout.RowLayout) -> list[str]:
        """See `configuration.TrainingRun`."""
        return [f"rows.{problem}" for problem in self.rows.problems_on(layout)]
