"""One row of numbers per step: JSON lines and TensorBoard always, Weights & Biases if configured.

A row is written by one process of a job. After a restart the files continue where the restored
checkpoint stands: rows of later steps are cut off, so each step is there exactly once.
"""

import dataclasses
import importlib
import json
import logging
import math
import os
import pathlib
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from prism_jax import errors, small_files
from prism_jax.checkpoints import lock, mirror

Json = Any
_ROW = {"step": int}
_TABLE = "rollout/responses"
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
        # It imports torch where that is installed: seconds that one process of a job pays.
        tensorboard = importlib.import_module("tensorboardX")
        self._writer = tensorboard.SummaryWriter(str(folder), purge_step=last_step + 1)

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of any JSON values, each with a picture."""

    rows: Sequence[Mapping[str, Json]]
    pictures: Sequence[Image.Image | None]


class Tables:
    """The tables of steps, on their way from the part of a run that makes them to a writer.

    A step's numbers are written one step later than its responses, and Weights & Biases ignores
    steps out of order, so a table waits for the numbers.
    """

    def __init__(self):
        self._waiting: dict[int, Table] = {}

    def add(self, step: int, table: Table) -> None:
        """Add the table of a step; one that runs again replaces it."""
        self._waiting[step] = table

    def take(self, step: int) -> Table | None:
        """Return the table of a step, and forget it and those of earlier steps."""
        table = self._waiting.get(step)
        self._waiting = {at: later for at, later in self._waiting.items() if at > step}
        return table


class WeightsAndBiases:
    """A run of Weights & Biases, continued by the id that is kept in the run's folder."""

    def __init__(self, workdir: pathlib.Path, *, project: str, name: str, tables: Tables):
        """Start or continue the run.

        Args:
          tables: those of the steps to come, sent with the numbers of their steps.

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
            small_files.replace(id_file, secrets.token_hex(4).encode())
        run_id = id_file.read_text(errors="replace").strip()
        if not re.fullmatch(r"[\w-]+", run_id):
            raise errors.InputError(f"{id_file}: damaged, {run_id[:40]!r} is not the id of a run")
        self._wandb, self._tables = wandb, tables
        self._run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(workdir),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send one row; the service ignores steps it already has."""
        table = self._tables.take(step)
        shown = {} if table is None else {_TABLE: self._table(table)}
        self._run.log(dict(values) | shown, step=step)

    def _table(self, table: Table) -> Any:
        """Return a table of the package."""
        names = list(dict.fromkeys(name for row in table.rows for name in row))
        shown = {id(picture): self._wandb.Image(picture) for picture in table.pictures if picture}
        columns = [[shown.get(id(picture)) for picture in table.pictures]]
        columns += [_column([row.get(name) for row in table.rows]) for name in names]
        data = [list(row) for row in zip(*columns, strict=True)]
        return self._wandb.Table(columns=["picture", *names], data=data)

    def sync(self) -> None:
        """Do nothing: the package sends in the background."""

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


def _column(values: Sequence[Json]) -> list[Json]:
    """Return the values of a column of one simple type; of others as JSON text."""
    kinds = {float if type(value) is int else type(value) for value in values if value is not None}
    if len(kinds) <= 1 and kinds <= {float, str, bool}:
        return list(values)
    return [None if value is None else json.dumps(value) for value in values]


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
