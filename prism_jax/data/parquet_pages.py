"""Check the pages of a parquet file before they are unpacked.

A file of a few kilobytes can hold a page of gigabytes, or a value that thousands of rows repeat.
The footer may be wrong about that. The library reads by the header of each page, so only the
headers are trusted here.

Source: parquet-format src/main/thrift/parquet.thrift FileMetaData, PageHeader, in thrift's compact
protocol.
"""

import dataclasses
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from prism_jax import errors

# The memory for a row, for a batch of rows, and for the repeated values of a column.
DENSE_BYTES = 256 << 20
# Larger pages must not be the result of compression alone.
_LARGE_PAGE_BYTES = 64 << 20
_LARGEST_RATIO = 100
_LARGEST_FIXED_BYTES = 1 << 30
_MOST_VALUES = 1 << 26
_HEADER_BYTES = 512
_LARGEST_HEADER_BYTES = 16 << 20
# Encodings by reference to other values, so that a page may unpack to more than its bytes.
_REPEATING = (2, 7, 8)  # PLAIN_DICTIONARY, DELTA_BYTE_ARRAY, RLE_DICTIONARY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan to read the rows of a file in bounded memory."""

    as_dictionary: tuple[str, ...]  # columns whose repeated values are stored once
    batch_rows: tuple[int, ...]  # of each row group


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chunk:
    """The pages of a column in a row group."""

    num_values: int
    unpacked_bytes: int
    largest_bytes: int  # of a page
    is_repeating: bool  # values may refer to other values


def plan(file: pq.ParquetFile, stream: BinaryIO, *, batch_rows: int) -> Plan:
    """Return a plan from the headers of all pages.

    Raises:
      InputError: the pages would unpack to far more than the file's size, or are damaged.
    """
    as_dictionary: dict[str, None] = {}
    rows = []
    for number, group in enumerate(_row_groups(stream), start=1):
        num_rows, columns = group.get(3), group.get(1)
        if type(num_rows) is not int or not isinstance(columns, list):
            raise errors.InputError(f"row group {number} of the footer cannot be read")
        if not 0 <= num_rows <= _MOST_VALUES:
            raise errors.InputError(
                f"row group {number}: must have at most {_MOST_VALUES} rows, got {num_rows}"
            )
        total = 0
        for place, column in enumerate(columns):
            kind = file.schema.column(place)
            where = f"row group {number}, column {kind.path}"
            chunk = _chunk(stream, column, where)
            is_fixed = kind.physical_type == "FIXED_LEN_BYTE_ARRAY"
            if is_fixed and chunk.num_values * kind.length > _LARGEST_FIXED_BYTES:
                raise errors.InputError(
                    f"{where}: {chunk.num_values} values of {kind.length} bytes, the limit is "
                    f"{_LARGEST_FIXED_BYTES} together"
                )
            most_bytes = chunk.num_values * (chunk.largest_bytes if chunk.is_repeating else 0)
            if kind.physical_type == "BYTE_ARRAY" and most_bytes > DENSE_BYTES:
                as_dictionary[kind.path] = None
            total += chunk.unpacked_bytes
        row_bytes = total // max(num_rows, 1)
        rows.append(max(1, min(batch_rows, DENSE_BYTES // max(row_bytes, 1))))
    return Plan(as_dictionary=tuple(as_dictionary), batch_rows=tuple(rows))


def _row_groups(stream: BinaryIO) -> list[dict[int, Any]]:
    """Return the row groups of the footer, without the library.

    The library aborts the process if the footer's statistics of a column are damaged.
    """
    stream.seek(-8, 2)
    end = stream.tell()
    size = int.from_bytes(stream.read(4), "little")
    stream.seek(max(0, end - size))
    try:
        footer = _Compact(stream.read(size)).struct()
    except (IndexError, ValueError, RecursionError) as error:
        raise errors.InputError(f"the footer cannot be read: {error}") from error
    groups = footer.get(4, [])
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise errors.InputError("the footer has no row groups")
    return groups


def _chunk(stream: BinaryIO, column: Any, where: str) -> _Chunk:
    details = column.get(3) if isinstance(column, dict) else None
    details = details if isinstance(details, dict) else {}
    # The data pages and the dictionary, which is optional.
    starts = [start for start in (details.get(9), details.get(11)) if start]
    size = details.get(7)
    if not starts or not all(type(n) is int and n >= 0 for n in (*starts, size)):
        raise errors.InputError(f"{where}: the footer does not say where its pages are")
    at = min(starts)
    end = at + size
    num_values = unpacked = largest = 0
    is_repeating = False
    while at < end:
        header, size = _header(stream, at, where)
        page_bytes, packed_bytes = header.get(2), header.get(3)
        if not all(type(n) is int and n >= 0 for n in (page_bytes, packed_bytes)):
            raise errors.InputError(f"{where}: no page at byte {at}")
        if page_bytes > _LARGE_PAGE_BYTES and page_bytes > _LARGEST_RATIO * packed_bytes:
            raise errors.InputError(
                f"{where}: a page of {packed_bytes} bytes unpacks to {page_bytes}, more than "
                f"{_LARGEST_RATIO} times as many"
            )
        # The header of a data page, version 1 or 2, and the field number of its encoding.
        for details, encoding in ((header.get(5), 2), (header.get(8), 4)):
            if isinstance(details, dict):
                count = details.get(1)
                num_values += count if type(count) is int and count > 0 else 0
                is_repeating |= details.get(encoding) in _REPEATING
        unpacked += page_bytes
        largest = max(largest, page_bytes)
        at += size + packed_bytes
    if num_values > _MOST_VALUES:
        raise errors.InputError(
            f"{where}: must have at most {_MOST_VALUES} values, got {num_values}"
        )
    return _Chunk(
        num_values=num_values,
        unpacked_bytes=unpacked,
        largest_bytes=largest,
        is_repeating=is_repeating,
    )


def _header(stream: BinaryIO, at: int, where: str) -> tuple[dict[int, Any], int]:
    """Return the fields, by number, of the page header at a position, and its size."""
    num_bytes = _HEADER_BYTES
    while True:
        stream.seek(at)
        data = stream.read(num_bytes)
        try:
            reader = _Compact(data)
            return reader.struct(), reader.at
        except IndexError as error:
            if len(data) < num_bytes or num_bytes >= _LARGEST_HEADER_BYTES:
                raise errors.InputError(f"{where}: no page at byte {at}") from error
        except (ValueError, RecursionError) as error:
            raise errors.InputError(f"{where}: no page at byte {at}: {error}") from error
        num_bytes *= 8


class _Compact:
    """A reader of thrift's compact protocol; IndexError if the bytes end too early."""

    def __init__(self, data: bytes):
        self.at = 0
        self._data = data

    def struct(self) -> dict[int, Any]:
        """Return the numbers, lists and structs of a struct by field number; texts are skipped."""
        values: dict[int, Any] = {}
        field = 0
        while (head := self._byte()) != 0:
            delta, kind = head >> 4, head & 15
            field = field + delta if delta else self._signed()
            values[field] = self._value(kind)
        return values

    def _value(self, kind: int) -> Any:
        if kind in (1, 2):  # true and false take no further bytes
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self._unsigned())
        if kind in (9, 10):
            return self._list()
        if kind == 12:
            return self.struct()
        raise ValueError(f"a value of kind {kind}")

    def _list(self) -> list[Any]:
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._unsigned()
        # In a list true and false are bytes.
        kind = 3 if head & 15 in (1, 2) else head & 15
        values = []
        for _ in range(count):
            values.append(self._value(kind))
        return values

    def _byte(self) -> int:
        value = self._data[self.at]
        self.at += 1
        return value

    def _skip(self, num_bytes: int) -> None:
        if self.at + num_bytes > len(self._data):
            raise IndexError
        self.at += num_bytes

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
