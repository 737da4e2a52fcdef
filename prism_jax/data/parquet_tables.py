"""Rows of parquet files, read in order in batches or by number, in bounded memory."""

import bisect
import collections
import itertools
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prism_jax import errors
from prism_jax.data import parquet_pages, paths, records

_BATCH_ROWS = 32
# Uncompressed bytes of row groups cached for random access; at least a single group is cached.
_CACHE_BYTES = 2 << 30
_OBJECT_BYTES = 64  # approximate size of a value in Python
# Raised by the library and Python's types for damaged files and for values beyond their range.
_DAMAGE = (
    OSError,
    pa.ArrowException,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    RuntimeError,
    MemoryError,
)

Entry = tuple[int, dict[str, Any] | records.RowError]


class ParquetTable:
    """The rows of a parquet file as dictionaries.

    Reading by number loads whole row groups: shuffled training on files larger than the cache
    should read a built folder instead. Thread-safe.
    """

    def __init__(self, path: str):
        self.path = path
        self._file: pq.ParquetFile | None = None
        self._plan: parquet_pages.Plan | None = None
        self._ends: list[int] = []
        self._groups: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self._lock = threading.Lock()

    def scan(self) -> Iterator[Entry]:
        """Yield each row's number, counted from 1, and its fields or the error in them.

        Raises:
          InputError: the file cannot be read, is not parquet, is damaged, or unpacks to far more
            than its size.
        """
        number = itertools.count(1)
        with self._lock:
            self._open()
        with paths.open_binary(self.path) as stream:
            file = self._explained(self._parquet, stream)
            for group, batch_rows in enumerate(self._plan.batch_rows):
                batches = self._explained(file.iter_batches, batch_rows, [group])
                count = 0
                while (batch := self._explained(next, batches, None)) is not None:
                    count += batch.num_rows
                    for row in _rows(batch):
                        yield next(number), row
                start = self._ends[group - 1] if group else 0
                if count != self._ends[group] - start:
                    raise errors.InputError(
                        f"{self.path}: row group {group + 1} has {count} rows, its footer says "
                        f"{self._ends[group] - start}"
                    )

    def __len__(self) -> int:
        with self._lock:
            self._open()
            return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> Entry:
        """Return a row by its index, counted from 0, as `scan` yields it."""
        with self._lock:
            self._open()
            group = bisect.bisect_right(self._ends, index)
            table = self._group(group)
        start = self._ends[group - 1] if group else 0
        return index + 1, next(_rows(table.slice(index - start, 1)))

    def _open(self) -> None:
        if self._file is not None:
            return
        stream = paths.open_binary(self.path)
        file = self._explained(pq.ParquetFile, stream)
        names = self._explained(lambda: file.schema_arrow.names)
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        if twice:
            raise errors.InputError(f"{self.path}: two columns have the name {twice[0]!r:.100}")
        with paths.open_binary(self.path) as pages:
            plan = self._explained(lambda: parquet_pages.plan(file, pages, batch_rows=_BATCH_ROWS))
        metadata = file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = list(itertools.accumulate(sizes))
        self._plan = plan
        self._file = self._explained(self._parquet, stream) if plan.as_dictionary else file

    def _parquet(self, stream: BinaryIO) -> pq.ParquetFile:
        return pq.ParquetFile(stream, read_dictionary=list(self._plan.as_dictionary))

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
        except errors.InputError as error:
            raise errors.InputError(f"{self.path}: {error}") from error
        except _DAMAGE as error:
            cause = records.shorten(f"{type(error).__name__}: {error}", 300)
            raise errors.InputError(f"{self.path}: not a readable parquet file: {cause}") from error


def _rows(batch: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any] | records.RowError]:
    """Yield the rows, converted one by one if together they would take too much memory."""
    if sum(map(_num_bytes, batch.columns)) <= parquet_pages.DENSE_BYTES:
        try:
            rows = batch.to_pylist()
        except _DAMAGE:
            rows = (_row(batch.slice(i, 1)) for i in range(batch.num_rows))
        yield from rows
        return
    for i in range(batch.num_rows):
        yield _row(batch.slice(i, 1))


def _row(row: pa.RecordBatch | pa.Table) -> dict[str, Any] | records.RowError:
    num_bytes = sum(map(_num_bytes, row.columns))
    if num_bytes > parquet_pages.DENSE_BYTES:
        return records.RowError(
            "row_too_big",
            f"the row has {num_bytes} bytes, the limit is {parquet_pages.DENSE_BYTES}",
        )
    try:
        return {
            name: _value(column, name)
            for name, column in zip(row.schema.names, row.columns, strict=True)
        }
    except records.RowError as error:
        return error


def _value(column: pa.Array | pa.ChunkedArray, name: str) -> Any:
    """Return the only value of a column, as text if Python has no such type."""
    try:
        return column.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise records.RowError("not_utf8", f"column {name!r} is not UTF-8: {error}") from error
    except _DAMAGE as error:
        try:
            return column.cast(pa.string()).to_pylist()[0]
        except _DAMAGE:
            raise records.RowError(
                "bad_type", f"column {name!r}: a {column.type} that cannot be read: {error}"
            ) from error


def _num_bytes(values: pa.Array | pa.ChunkedArray) -> int:
    """Return the bytes of values once each is a separate Python object."""
    if isinstance(values, pa.ChunkedArray):
        return sum(map(_num_bytes, values.chunks))
    kind = values.type
    if isinstance(values, pa.ExtensionArray):
        return _num_bytes(values.storage)
    if pa.types.is_dictionary(kind):
        if not _is_binary(kind.value_type):
            return _OBJECT_BYTES * len(values)
        lengths = pc.binary_length(values.dictionary)
        return pc.sum(pc.cast(lengths.take(values.indices), pa.int64())).as_py() or 0
    if pa.types.is_struct(kind):
        return sum(map(_num_bytes, values.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _num_bytes(values.flatten()) + 8 * len(values)
    return max(values.nbytes, _OBJECT_BYTES * len(values))


def _is_binary(kind: pa.DataType) -> bool:
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return is_bytes or pa.types.is_string(kind) or pa.types.is_large_string(kind)
