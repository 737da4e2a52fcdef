"""The configuration of supervised fine-tuning; configs/sft.py gives the values."""

import dataclasses
from typing import Literal

from prism_jax import configuration, row_layout
from prism_jax.setup import train_sections


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(configuration.Section):
    """The demonstrations, and the rows into which they are packed."""

    # PATH, PATH#ENTRY of a dataset_info.json, or PATH@FILE.py:FUNCTION.
    train: tuple[str, ...]
    weights: tuple[float, ...]  # of the sources in the mixture; empty: each row once an epoch
    held_out: tuple[str, ...]  # for the evaluation loss; empty: none
    image_root: str  # of relative image paths; empty: the folder of the file
    cache_dir: str = configuration.free()  # for built data sets on gs://
    max_bad_rows: int
    overlong: Literal["error", "filter"]  # for demonstrations that fit no packed row
    min_pixels: int | None  # of an image; None: as the model's folder says
    max_pixels: int | None
    limit_image_pixels: int  # of an image file; a larger one is a wrong row
    row_tokens: int
    row_examples: int  # most examples in a row
    row_patches: tuple[int, ...]  # sizes of vision rows, ascending; empty: rows without images
    row_images: int
    num_open_rows: int  # rows that are filled at a time
    num_threads: int = configuration.free()
    cache_mebibytes: int = configuration.free()  # memory for encoded demonstrations

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.not_empty(self, "train")
        problems += configuration.at_least(
            self, 1, "row_tokens", "row_examples", "row_images", "num_open_rows", "num_threads"
        )
        problems += configuration.at_least(self, 0, "max_bad_rows", "cache_mebibytes")
        if self.weights and len(self.weights) != len(self.train):
            problems.append(f"weights must be empty or one for each source, got {self.weights}")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(train_sections.TrainOnData):
    """The length of a run and the size of a step."""

    # Packed rows that a step learns from: its batch, the same on any devices.
    step_rows: int
    # Of a microbatch, over all devices; -1: one on each part (data x fsdp) of the mesh. A step
    # takes as many microbatches as its rows need, the last filled up with empty rows. That does not
    # change the training, so it may change on resume, but for a router's term: see `feed.Feed`.
    num_rows: int = configuration.free()
    head_chunk_tokens: int  # whose logits are in a device's memory at a time
    head: Literal["fused", "recompute"]  # see `losses.sft.nll`
    load_balance: float  # coefficient of the router's term; of no effect on a dense model

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = super().problems()
        problems += configuration.at_least(self, 1, "step_rows", "head_chunk_tokens")
        if self.num_rows != -1:
            problems += configuration.at_least(self, 1, "num_rows")
        return problems + configuration.at_least(self, 0, "load_balance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.TrainingRun):
    """The configuration of supervised fine-tuning."""

    data: Data
    train: Train
    optim: configuration.Optim
    evaluate: train_sections.Evaluate = configuration.free()

    @property
    def splits_length(self) -> bool:
        """See `configuration.TrainingRun`."""
        return True

    def problems_on(self, layout: row_layout.RowLayout) -> list[str]:
        """See `configuration.TrainingRun`."""
        return layout.problems(
            self.train.num_rows,
            self.data.row_tokens,
            *self.data.row_patches,
            name="train.num_rows",
            size_names="data.row_tokens and data.row_patches",
        )

    def microbatches(self, layout: row_layout.RowLayout) -> tuple[int, int]:
        """Return the number of microbatches of a step, and the rows of each."""
        num_rows = layout.rows(self.train.num_rows)
        return -(-self.train.step_rows // num_rows), num_rows
