"""The report of a step of alignment: metrics, the dump of its responses, and the honesty panel."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from prism_jax import metrics
from prism_jax.discriminator import step_scores
from prism_jax.policy import rollouts
from prism_jax.running import dump as running_dump
from prism_jax.stages.align import advantages as align_advantages
from prism_jax.stages.align import feed as align_feed
from prism_jax.stages.align import honesty as align_honesty
from prism_jax.stages.align.updates import State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The dump of a step's responses, and the panel that is measured beside it."""

    dump: running_dump.Dump
    panel: align_honesty.Panel

    def __call__(
        self,
        step: int,
        state: State,
        prompts: align_feed.Prompts,
        responses: rollouts.Responses,
        scores: step_scores.StepScores,
        comparison: align_advantages.Compared,
    ) -> metrics.Metrics:
        """Write the dump, measure the panel where it is due, and return all metrics.

        Args:
          step: number of this step, counted from 1.
          state: before the step's updates.
        """
        self.dump.write(
            step, prompts.rows, responses.segments, _columns(scores.rewarding, comparison)
        )
        # The panel scores the pairs again with changes, still with the parameters from before the
        # update.
        logged = scores.metrics | responses.metrics() | comparison.metrics
        return logged | self.panel(
            step, state["discriminator"].params, prompts, responses, scores.by_name
        )


def _columns(
    scores: step_scores.Places, comparison: align_advantages.Compared
) -> dict[str, Sequence[Any]]:
    """Return the dump's columns besides the text, one value a response."""
    advantages = comparison.by_part["response"]
    num_prompts = len(next(iter(scores.values())).teacher)
    num_responses = len(advantages) // num_prompts
    columns: dict[str, Sequence[Any]] = {"advantage": advantages}
    for part, values in comparison.by_part.items():
        if part != "response":
            columns[f"{part}_advantage"] = values
    for name, segment in scores.items():
        pairs = zip(segment.student, segment.is_pair, strict=True)
        # A response without a score has None in the dump: 0 is a score.
        columns[f"{name}_score"] = [score if is_scored else None for score, is_scored in pairs]
        # Repeated, so that each line of the dump can be read alone.
        columns[f"teacher_{name}_score"] = np.repeat(segment.teacher, num_responses)
    if comparison.is_judged:
        columns["accuracy"] = comparison.accuracy
    return columns
