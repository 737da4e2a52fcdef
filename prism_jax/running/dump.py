"""The responses of a step, written to the run's folder."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from prism_jax.data import images, records, video_files
from prism_jax.rewards import tags
from prism_jax.running import metric_writers
from prism_jax.running import run as run_lib
from prism_jax.setup import agreement

Json = Any
_FOLDER = "rollouts"
_SIDE_PIXELS = 320


class Dump:
    """The files `rollouts/<step>.jsonl`, a line for each response of a step."""

    def __init__(
        self,
        workdir: pathlib.Path,
        every_steps: int | None,
        *,
        inputs: agreement.Inputs,
        tables: metric_writers.Tables | None,
    ):
        """Store the arguments; nothing is opened before the first write.

        Args:
          inputs: gets the data of each step, whether it is written or not.
          tables: gets the lines too, with the first picture of each prompt; None: no writer shows
            them.
        """
        self._tables = tables
        self._folder = workdir / _FOLDER
        self._every_steps, self._inputs = every_steps, inputs

    def write(
        self,
        step: int,
        rows: Sequence[records.PromptRow],
        segments: Sequence[tags.Segments],
        values: Mapping[str, Sequence[Json]],
    ) -> None:
        """Write the responses that the step of this number learns from, where a dump is due.

        Args:
          values: further fields, one value a response.
        """
        texts = [response.text for response in segments]
        columns = {name: [_plain(value) for value in column] for name, column in values.items()}
        self._inputs.note(step - 1, [row.id for row in rows], texts, columns)
        is_due = self._every_steps is not None and step % self._every_steps == 0
        if not is_due or jax.process_index() != 0:
            return
        num_responses = len(segments) // max(1, len(rows))
        lines = []
        for number, response in enumerate(segments):
            row = rows[number // num_responses]
            line = {
                "step": step,
                "id": row.id,
                "response": number % num_responses,
                "ground_truth": row.ground_truth,
                "text": response.text,
                "caption": response.caption,
                "cot": response.cot,
                "format_ok": response.format_ok,
                "ended": response.ended,
                "response_tokens": response.response_tokens,
            }
            lines.append(line | {name: column[number] for name, column in columns.items()})
        metric_writers.write_dump(self._folder, step, lines)
        if self._tables is not None:
            pictures = [one for row in rows for one in [_thumbnail(row)] * num_responses]
            self._tables.add(step, metric_writers.Table(rows=lines, pictures=pictures))


def opened(run: run_lib.Run, every_steps: int | None) -> Dump:
    """Return the dump of a run; None: nothing is written."""
    return Dump(run.folder, every_steps, inputs=run.inputs, tables=run.tables)


def _thumbnail(row: records.PromptRow) -> Image.Image | None:
    """Return a small copy of a prompt's first picture, or of its first video's first frame."""
    if row.images:
        shown = images.open_stored(row.images[0])
    elif row.videos:
        shown = video_files.open_stored(row.videos[0]).frames[0]
    else:
        return None
    shown.thumbnail((_SIDE_PIXELS, _SIDE_PIXELS))
    return shown


def _plain(value: Any) -> Json:
    """Return numbers of NumPy as JSON values."""
    return value.item() if isinstance(value, np.generic) else value
