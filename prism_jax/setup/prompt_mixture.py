"""The prompts of alignment and RLVR: data sets, and the rows of each step."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from prism_jax import configuration
from prism_jax.data import packing, steps
from prism_jax.setup import corpora, row_shapes
from prism_jax.setup import prompts as prompts_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts(prompts_lib.Rules):
    """The data sets to train on, in the form of `prompts.Prompts`, with mixing weights."""

    path: tuple[str, ...]
    # Of each data set; empty: each row once an epoch. With weights an epoch has as many prompts as
    # there are rows, shared out by weight, and each data set goes round by itself: a step may take
    # a row of a small data set twice.
    weights: tuple[float, ...]

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.not_empty(self, "path") + super().problems()
        if self.weights and (len(self.weights) != len(self.path) or min(self.weights) <= 0):
            problems.append(
                f"weights must be empty or hold one positive number for each of the "
                f"{len(self.path)} data sets of path, got {self.weights}"
            )
        return problems


def require(opened: prompts_lib.Opened, num_prompts: int, *, field: str) -> None:
    """Raise InputError when there are fewer prompts than a step takes.

    Args:
      field: of the configuration, with the number of prompts that a step takes.
    """
    name = opened.report.name
    corpora.require_batch(len(opened.rows), num_prompts, name=name, field=f"config.{field}")


def index_steps(
    opened: prompts_lib.Opened,
    make: Callable[[Sequence[int]], Any],
    *,
    weights: Sequence[float],
    num_prompts: int,
    num_steps: int,
    seed: int,
    num_threads: int,
    microbatch_rows: int | None = None,
) -> steps.Steps:
    """Return the steps' prompts, epoch after epoch; a step may cross the end of an epoch.

    Args:
      microbatch_rows: where the training depends on them, see `row_shapes.Rows.num_rows`.
      make: turns the numbers of a step's rows into the stage's prompts; called in threads.
      weights: see `Prompts`.
    """
    packing.check_weights(opened.lengths, weights, field="config.prompts.weights")
    total = sum(opened.lengths)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return packing.epoch_order(opened.lengths, weights, seed=seed, epoch=epoch)

    def step(number: int) -> Any:
        places = range(number * num_prompts, (number + 1) * num_prompts)
        return make([int(order(place // total)[place % total]) for place in places])

    identity = {
        "rows of config.prompts.path": opened.digest,
        "num_prompts": num_prompts,
        "seed": seed,
        row_shapes.SPLIT: microbatch_rows,
    }
    if len(opened.lengths) > 1:
        identity |= {"lengths": list(opened.lengths), "weights": list(weights)}
    return steps.Steps(step, num_steps=num_steps, identity=identity, num_threads=num_threads)
