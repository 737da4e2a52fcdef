"""The configuration of the warm-up; configs/warmup.py gives the values."""

import dataclasses
from typing import Literal

from prism_jax import configuration, row_layout
from prism_jax.discriminator import config as discriminator_config
from prism_jax.discriminator import lengths as lengths_lib
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import segments
from prism_jax.honesty import panel as honesty_panel
from prism_jax.rewards import tags
from prism_jax.setup import models as setup_models
from prism_jax.setup import row_shapes, train_sections


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(configuration.Section):
    """The pairs, and the form in which the discriminator reads them."""

    # JSONL files, folders of them, or folders that `data build` wrote; the pairs themselves are
    # compared.
    train: tuple[str, ...] = configuration.free()
    held_out_fraction: float  # of the prompts, for evaluation; a prompt is on one side only
    # Of relative image paths; empty: the folder of the file.
    image_root: str = configuration.free()
    cache_dir: str = configuration.free()  # for built data sets on gs://
    max_bad_rows: int
    overlong: Literal["error", "filter"]  # for longer rows
    max_tokens: int  # of a prompt with one segment
    min_pixels: int | None  # of a picture, others are scaled; None: as the model's folder says
    max_pixels: int | None
    limit_image_pixels: int  # of a picture's file; a larger one is a wrong row
    sees_images: bool  # False: prompts are read without their pictures
    # Folder of tokenizer and chat template; empty: the model's. A text-only trunk needs that of the
    # policy, whose texts it is to score.
    words: str = configuration.free()
    view: segments.View  # the segments of a response
    # Where a segment is scored, see `discriminator.segments`.
    scored_token: Literal["last", "newline"]
    gate: tags.Gate  # the format that a response must have
    num_threads: int = configuration.free()

    @property
    def form(self) -> segments.Form:
        """Return the form of segments."""
        return segments.Form(
            view=self.view, scored_token=self.scored_token, teacher_max_tokens=None
        )

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.not_empty(self, "train")
        problems += configuration.at_least(self, 1, "max_tokens", "num_threads")
        if not 0 <= self.held_out_fraction < 1:
            problems.append(f"held_out_fraction must be in [0, 1), got {self.held_out_fraction}")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(discriminator_config.Pairs):
    """The numbers of the loss, a mean over all pairs of a step."""

    lengths: lengths_lib.PairLengths  # see `discriminator.lengths`

    def rule(self, model: setup_models.Model) -> discriminator_loss.PairRule:
        """Return the rule of the loss for this discriminator."""
        return self.pair_rule(
            model, microbatch_pairs=None, all_invalid="none", lengths=self.lengths
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(train_sections.TrainOnData):
    """The length of a run and the size of a step."""

    num_pairs: int  # of responses in a step; each gives a pair of every segment of the view

    def problems(self) -> list[str]:
        """See `Section`."""
        return super().problems() + configuration.at_least(self, 1, "num_pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.TrainingRun):
    """The configuration of the warm-up."""

    data: Data
    pairs: Pairs
    rows: row_shapes.Rows
    train: Train
    evaluate: train_sections.Evaluate = configuration.free()
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
