"""Batches of rows in a fixed shuffled order, for every process its share, with exact resume.

The position is one integer, the number of rows that all processes together have drawn, so a run
may continue with another number of processes: the same global batches follow.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from prism_jax import errors
from prism_jax.data import sources, validate

_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted:
    """Rows and their weight in the mixture; None: every row of every source once an epoch."""

    name: str
    rows: sources.Rows
    weight: float | None = None


class Batches:
    """An iterator over lists of transformed rows, this process's share of each batch.

    `get_state` is a small JSON object, the same in all processes that drew as many batches.
    """

    def __init__(
        self,
        dataset: grain.MapDataset,
        *,
        identity: dict[str, Any],
        batch_rows: int,
        process_index: int,
        process_count: int,
        num_threads: int,
    ):
        self._identity = identity
        self._batch_rows = batch_rows
        self._num_rows = len(dataset)
        self._next_row = 0
        self._elastic = grain.experimental.ElasticIterator(
            dataset,
            batch_rows,
            grain.sharding.ShardOptions(process_index, process_count),
            # Whole batches are made ahead, one a thread.
            read_options=grain.ReadOptions(
                num_threads=num_threads, prefetch_buffer_size=num_threads
            ),
        )

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> list[Any]:
        if self._next_row + self._batch_rows > self._num_rows:
            raise StopIteration
        boxes = next(self._elastic)
        self._next_row += self._batch_rows
        return list(boxes)

    def get_state(self) -> dict[str, Any]:
        """Return the position and what it belongs to, as JSON values."""
        return {"next_row": self._next_row} | self._identity

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at a position.

        Raises:
          InputError: the state belongs to other data, another seed or another batch size.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise errors.InputError(
                    f"cannot resume: data {name} was {state.get(name)} when the checkpoint was "
                    f"written and is {value} now"
                )
        self._next_row = state["next_row"]
        self._elastic.set_state({"global_next_index": self._next_row})

    def close(self) -> None:
        """Stop the threads that read ahead."""
        self._elastic.close()


def make(
    mixture: Sequence[Weighted],
    *,
    seed: int | None,
    batch_rows: int,
    transform: Callable[[Any], Any],
    process_index: int,
    process_count: int,
    num_epochs: int | None,
    num_threads: int,
) -> Batches:
    """Return the batches of a mixture of data sets.

    Without weights the sources are joined and every row is drawn once an epoch. With weights each
    source repeats by itself, and an epoch is as many rows as the sources have together; the rows
    interleave in fixed proportion, which Grain rounds to a hundredth of the smallest weight. Rows
    at the very end that fill no batch are dropped.

    Args:
      mixture: the data sets; all weights are given, or none.
      seed: of the order, new in every epoch; None keeps the order of the rows.
      batch_rows: rows of a batch over all processes, a multiple of their number.
      transform: applied to each row, in threads; must not depend on anything but the row.
      process_index: this process, from 0.
      process_count: the number of processes; process p draws rows p, p + count, … of a batch.
      num_epochs: None repeats for ever.
      num_threads: batches made ahead at a time.
    """
    if not mixture:
        raise errors.InputError("data needs at least one source, got none")
    name = " + ".join(part.name for part in mixture)
    num_rows = sum(len(part.rows) for part in mixture)
    validate.require_batch(num_rows, batch_rows, name=name)
    if batch_rows % process_count:
        raise errors.InputError(
            f"batch_rows must be a multiple of the {process_count} processes, got {batch_rows}"
        )
    if seed is not None and seed < 0:
        raise errors.InputError(f"data.seed must be >= 0 or None, got {seed}")
    if num_epochs is not None and num_epochs < 1:
        raise errors.InputError(f"data.num_epochs must be >= 1 or None, got {num_epochs}")
    dataset = _mix(mixture, seed)
    # The end is cut to whole batches so that all processes stop together.
    total = sys.maxsize if num_epochs is None else num_epochs * num_rows // batch_rows * batch_rows
    return Batches(
        dataset[:total].map(lambda row: _box(transform(row))),
        identity={
            "version": _VERSION,
            "batch_rows": batch_rows,
            "seed": seed,
            "sources": [[part.name, len(part.rows), part.weight] for part in mixture],
        },
        batch_rows=batch_rows,
        process_index=process_index,
        process_count=process_count,
        num_threads=num_threads,
    )


def _mix(mixture: Sequence[Weighted], seed: int | None) -> grain.MapDataset:
    """Return the endless sequence of rows."""
    weights = [part.weight for part in mixture]
    datasets = [grain.MapDataset.source(part.rows) for part in mixture]
    if all(weight is None for weight in weights):
        joined = grain.MapDataset.concatenate(datasets) if len(datasets) > 1 else datasets[0]
        return _shuffle(joined, seed, 0).repeat()
    if any(weight is None or weight <= 0 for weight in weights):
        raise errors.InputError(
            f"data weights must all be positive, or none be given, got {weights}"
        )
    for part in mixture:
        validate.require_batch(len(part.rows), 1, name=part.name)
    endless = [_shuffle(dataset, seed, i).repeat() for i, dataset in enumerate(datasets)]
    return grain.MapDataset.mix(endless, weights)


def _shuffle(dataset: grain.MapDataset, seed: int | None, part: int) -> grain.MapDataset:
    if seed is None:
        return dataset
    # Grain shuffles epoch e with seed + e; near seeds must not share epochs.
    (mixed,) = np.random.SeedSequence([seed, part]).generate_state(1)
    return dataset.shuffle(seed=int(mixed))


def _box(value: Any) -> np.ndarray:
    """Hide a value's structure from Grain's batching, which would stack its arrays."""
    box = np.empty((), dtype=object)
    box[()] = value
    return box
