"""Rows of JSON and JSON lines files, indexed in a single pass and then read by number."""

import array
import json
import re
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

from prism_jax import errors
from prism_jax.data import paths, records

_CHUNK_BYTES = 1 << 22
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WHITE = b" \t\r\n"
# A whole string, a structural character, or (last) the quote of a string that the buffer cuts.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},]|"', re.DOTALL)

Entry = tuple[int, dict[str, Any] | records.RowError]


class JsonTable:
    """The objects of a JSON array or of JSON lines: read once in order, then by number.

    A `.json` file that starts with a bracket is an array; any other file is JSON lines, in which
    blank lines are ignored. Only the positions of the rows are in memory. Random access needs a
    finished `scan`. Thread-safe.
    """

    def __init__(self, path: str):
        self.path = path
        self._starts = array.array("q")
        self._lengths = array.array("q")
        self._numbers = array.array("q")
        self._is_scanned = False
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()

    def scan(self) -> Iterator[Entry]:
        """Yield each row's number, counted from 1, and its object or the error in it.

        Raises:
          InputError: the file cannot be read, or is not a complete JSON array.
        """
        starts, lengths, numbers = array.array("q"), array.array("q"), array.array("q")
        with paths.open_binary(self.path) as stream, paths.explain(self.path):
            head = stream.read(_CHUNK_BYTES)
            is_array = self.path.endswith(".json") and _content_start(head) == b"["
            pieces = _array_pieces if is_array else _line_pieces
            for number, start, text in pieces(stream, head, self.path):
                starts.append(start)
                lengths.append(len(text))
                numbers.append(number)
                yield number, _try_parse(text)
        self._starts, self._lengths, self._numbers = starts, lengths, numbers
        self._is_scanned = True

    def __len__(self) -> int:
        assert self._is_scanned, f"{self.path} must be scanned before its rows are counted"
        return len(self._starts)

    def read(self, index: int) -> Entry:
        """Return a row by its index, counted from 0, as `scan` yields it."""
        assert self._is_scanned, f"{self.path} must be scanned before its rows are read by number"
        with self._lock, paths.explain(self.path):
            if self._file is None:
                self._file = paths.open_binary(self.path)
            self._file.seek(self._starts[index])
            text = self._file.read(self._lengths[index])
        return self._numbers[index], _try_parse(text)


def _content_start(head: bytes) -> bytes:
    return head.removeprefix(_BYTE_ORDER_MARK).lstrip(_WHITE)[:1]


def _try_parse(text: bytes) -> dict[str, Any] | records.RowError:
    try:
        value = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return records.RowError("not_utf8", f"byte {error.start} of the row is not UTF-8")
    except (ValueError, RecursionError) as error:
        return records.RowError("malformed", f"not JSON: {error}")
    if not isinstance(value, dict):
        return records.RowError("bad_type", f"a row must be an object, got {type(value).__name__}")
    return value


def _line_pieces(stream: BinaryIO, head: bytes, path: str) -> Iterator[tuple[int, int, bytes]]:
    """Yield the line number, offset and text of each line that is not blank."""
    del head, path
    stream.seek(0)
    start = 0
    for number, line in enumerate(stream, start=1):
        # Files joined by `cat` have a mark at the start of each.
        text = line.strip(_WHITE).removeprefix(_BYTE_ORDER_MARK).strip(_WHITE)
        if text:
            yield number, start + line.index(text), text
        start += len(line)


def _array_pieces(stream: BinaryIO, head: bytes, path: str) -> Iterator[tuple[int, int, bytes]]:
    """Yield the number, offset and text of each element of the array, wrong ones included.

    Only brackets, commas and whole strings are examined, so that a wrong element does not end the
    scan: parsing that row reports it.
    """
    buffer, base, at = head, 0, 0  # buffer[0] is byte `base` of the file; `at` is in the buffer
    depth, number, element = 0, 0, 0
    while True:
        for token in _TOKEN.finditer(buffer, at):
            character, at = token.group()[:1], token.end()
            if token.group() == b'"':
                at = token.start()
                break
            if character in b"[{":
                depth += 1
                if depth == 1:
                    element = at
            elif character in b"]}":
                depth -= 1
            if depth == 0 or (depth == 1 and character == b","):
                text = buffer[element : token.start()]
                if text.strip(_WHITE) or character == b"," or number:
                    number += 1
                    yield number, base + element, text
                element = at
            if depth == 0:
                _check_end(stream, buffer[at:], path)
                return
        else:
            at = len(buffer)
        chunk = stream.read(_CHUNK_BYTES)
        if not chunk:
            raise errors.InputError(
                f"{path}: the file ends inside its JSON array, row {number + 1}"
            )
        buffer, base, at, element = buffer[element:] + chunk, base + element, at - element, 0


def _check_end(stream: BinaryIO, rest: bytes, path: str) -> None:
    while rest:
        if rest.strip(_WHITE):
            raise errors.InputError(f"{path}: text after the end of the JSON array: {rest[:40]!r}")
        rest = stream.read(_CHUNK_BYTES)
