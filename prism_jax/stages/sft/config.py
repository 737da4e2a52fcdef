"""The configuration of supervised fine-tuning; configs/sft.py gives the values."""

import dataclasses
from typing import Literal

from prism_jax import configuration
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

    num_rows: int  # packed rows of a microbatch, over all devices
    num_microbatches: int
    head_chunk_tokens: int  # whose logits are in a device's memory at a time
    head: Literal["fused", "recompute"]  # see `losses.sft.nll`
    load_balance: float  # coefficient of the router's term; of no effect on a dense model

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = super().problems()
        problems += configuration.at_least(
            self, 1, "num_rows", "num_microbatches", "head_chunk_tokens"
        )
        return problems + configuration.at_least(self, 0, "load_balance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.TrainingRun):
    """The configuration of supervised fine-tuning."""

    data: Data
    train: Train
    optim: configuration.Optim
    evaluate: train_sections.Evaluate = configuration.free()
