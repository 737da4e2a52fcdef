"""Rows of parquet files, read in batches from front to back or by number."""

import bisect
import collections
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_jax import errors
from prism_jax.data import paths, records

_BATCH_ROWS = 32
# Random access keeps row groups up to this many bytes (uncompressed) and never fewer than one.
_CACHE_BYTES = 2 << 30

Entry = tuple[int, dict[str, Any] | records.RowError]


class ParquetTable:
    """The rows of a parquet file as dictionaries.

    Reading by number loads whole row groups: shuffled training on files larger than the cache
    should read a built folder instead. Safe to use from several threads.
    """

    def __init__(self, path: str):
        self.path = path
        self._file: pq.ParquetFile | None = None
        self._ends: list[int] = []
        self._groups: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self._lock = threading.Lock()

    def scan(self) -> Iterator[Entry]:
        """Yield every row's number, counted from 1, and its fields or what is wrong with them.

        Raises:
          InputError: the file cannot be read, is no parquet, or is damaged.
        """
        number = itertools.count(1)
        with self._lock:
            self._open()
        with paths.open_binary(self.path) as stream:
            batches = self._explained(pq.ParquetFile(stream).iter_batches, _BATCH_ROWS)
            while (batch := self._explained(next, batches, None)) is not None:
                for row in _rows(batch):
                    yield next(number), row

    def __len__(self) -> int:
        with self._lock:
            self._open()
            return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> Entry:
        """Return one row by its index, counted from 0, as `scan` gave it."""
        with self._lock:
            self._open()
            group = bisect.bisect_right(self._ends, index)
            table = self._group(group)
        start = self._ends[group - 1] if group else 0
        return index + 1, _rows(table.slice(index - start, 1))[0]

    def _open(self) -> None:
        if self._file is None:
            stream = paths.open_binary(self.path)
            self._file = self._explained(pq.ParquetFile, stream)
            metadata = self._file.metadata
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            self._ends = list(itertools.accumulate(sizes))

    def _group(self, group: int) -> pa.Table:
        if group in self._groups:
            self._groups.move_to_end(group)
            return self._groups[group]
        table = self._explained(self._file.read_row_group, group)
        self._groups[group] = table
        while len(self._groups) > 1 and sum(t.nbytes for t in self._groups.values()) > _CACHE_BYTES:
            self._groups.popitem(last=False)
        return table

    def _explained(self, function, *arguments):
        try:
            return function(*arguments)
        except (OSError, pa.ArrowException) as error:
            raise errors.InputError(f"{self.path}: not a readable parquet file: {error}") from error


def _rows(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any] | records.RowError]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [records.RowError("not_utf8", f"a string of the row is not UTF-8: {error}")]
    return [row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1))]
