"""One row of numbers per step: JSON lines and TensorBoard always, Weights & Biases if configured.

A row is written by one process of a job. After a restart the files continue where the restored
checkpoint stands: rows of later steps are cut off, so each step is there exactly once.
"""

import importlib
import json
import logging
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import tensorboardX

from prism_jax import errors, small_files
from prism_jax.checkpoints import lock, mirror

Json = Any
_ROW = {"step": int}
_log = logging.getLogger(__name__)


class Writer(Protocol):
    """A destination of the numbers of each step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row; steps come in rising order."""

    def sync(self) -> None:
        """Put all written rows on disk."""

    def close(self) -> None:
        """Sync and close the files."""


class JsonLines:
    """The file `metrics.jsonl`: {"step": 3, "loss/total": 0.5, ...}, one line a step.

    Numbers that JSON does not have are the strings "NaN", "Infinity" and "-Infinity", which
    Python's `float` reads.
    """

    def __init__(self, path: pathlib.Path, *, last_step: int):
        """Open for appending; drop a half-written last line and the rows after `last_step`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.num_dropped = cut_after(path, last_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line and hand it to the system, so that killing the process loses none."""
        row = {"step": step} | {name: _number(value) for name, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until the lines are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()


class TensorBoard:
    """TensorBoard event files; finite numbers only, as its plots cannot show others."""

    def __init__(self, folder: pathlib.Path, *, last_step: int):
        """Open a new event file that hides the steps of older files after `last_step`."""
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def sync(self) -> None:
        """Hand the events to the system."""
        self._writer.flush()

    def close(self) -> None:
        """Sync and close."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, continued by the id that is kept in the run's folder."""

    def __init__(self, workdir: pathlib.Path, *, project: str, name: str):
        """Start or continue the run.

        Raises:
          InputError: the `wandb` package is not installed.
        """
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise errors.InputError(
                "log.wandb_project is set but the package wandb is missing: "
                "pip install 'prism-jax[wandb]', or leave log.wandb_project empty"
            ) from error
        id_file = workdir / "wandb_id.txt"
        if not id_file.exists():
            small_files.replace(id_file, wandb.util.generate_id().encode())
        run_id = id_file.read_text(errors="replace").strip()
        if not re.fullmatch(r"[\w-]+", run_id):
            raise errors.InputError(f"{id_file}: damaged, {run_id[:40]!r} is not the id of a run")
        self._run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(workdir),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send one row; the service ignores steps it already has."""
        self._run.log(dict(values), step=step)

    def sync(self) -> None:
        """Do nothing: the package sends in the background."""

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


class Writers:
    """Several writers of each row; without any it is the writer of the other processes."""

    def __init__(self, writers: Iterable[Writer]):
        self._writers = list(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row everywhere.

        Raises:
          InputError: another job took the run's folder over, see `checkpoints.lock.check`.
        """
        lock.check()
        for writer in self._writers:
            writer.write(step, values)

    def sync(self) -> None:
        """Put everything on disk, and on gs:// where the run is."""
        for writer in self._writers:
            writer.sync()
        mirror.upload()

    def close(self) -> None:
        """Close all."""
        for writer in self._writers:
            writer.close()


def cut_after(path: pathlib.Path, last_step: int) -> int:
    """Keep the whole lines of a JSONL file with `step` <= last_step; return the number removed.

    The file is replaced atomically, and not touched when no row has to go. Anything behind the row
    of `last_step` goes: a power cut may leave garbage there.

    Raises:
      InputError: a line before that is damaged.
    """
    if not path.exists():
        return 0
    *lines, half = path.read_bytes().split(b"\n")
    whole, newest_step, num_dropped = [], 0, 1 if half else 0
    for number, line in enumerate(lines, start=1):
        try:
            step = small_files.parse(line, _ROW, where=f"{path}: line {number}")["step"]
        except errors.InputError as error:
            if newest_step < last_step:
                raise errors.InputError(
                    f"{error}; remove the line, or go back to a step before it"
                ) from error
            step = math.inf
        if step <= last_step:
            whole.append(line + b"\n")
            newest_step = max(newest_step, step)
        else:
            num_dropped += 1
    if num_dropped:
        small_files.replace(path, b"".join(whole))
        _log.info("dropped %d rows after step %d from %s", num_dropped, last_step, path)
    return num_dropped


def write_dump(folder: pathlib.Path, step: int, rows: Iterable[Mapping[str, Json]]) -> None:
    """Write rows of any JSON to `<folder>/<step>.jsonl`, whole or not at all.

    A step that runs again after a restart replaces its file.

    Raises:
      InputError: another job took the run's folder over, see `checkpoints.lock.check`.
    """
    lock.check()
    folder.mkdir(parents=True, exist_ok=True)
    lines = [small_files.dumps(dict(row)) + b"\n" for row in rows]
    small_files.replace(folder / f"{step:08d}.jsonl", b"".join(lines))
    mirror.upload()


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
