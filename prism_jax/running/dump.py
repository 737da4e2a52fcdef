"""The responses of a step, written to the run's folder."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from prism_jax.data import records
from prism_jax.rewards import tags
from prism_jax.running import metric_writers

Json = Any
_FOLDER = "rollouts"


class Dump:
    """Write a step's responses to `rollouts/<step>.jsonl`, one line each."""

    def __init__(self, workdir: pathlib.Path, every_steps: int | None):
        self._folder = workdir / _FOLDER
        self._every_steps = every_steps

    def write(
        self,
        step: int,
        rows: Sequence[records.PromptRow],
        segments: Sequence[tags.Segments],
        values: Mapping[str, Sequence[Json]],
    ) -> None:
        """Write the responses that the step of this number learns from, where one is due.

        Args:
          values: further fields, one value a response.
        """
        is_due = self._every_steps is not None and step % self._every_steps == 0
        if not is_due or jax.process_index() != 0:
            return
        each = len(segments) // max(1, len(rows))
        lines = []
        for number, one in enumerate(segments):
            row = rows[number // each]
            line = {
                "step": step,
                "id": row.id,
                "response": number % each,
                "ground_truth": row.ground_truth,
                "text": one.text,
                "caption": one.caption,
                "cot": one.cot,
                "format_ok": one.format_ok,
                "ended": one.ended,
                "response_tokens": one.response_tokens,
            }
            lines.append(line | {name: _plain(column[number]) for name, column in values.items()})
        metric_writers.write_dump(self._folder, step, lines)


def _plain(value: Any) -> Json:
    """Return numbers of NumPy as JSON values."""
    return value.item() if isinstance(value, np.generic) else value
