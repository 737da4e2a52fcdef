"""Rows of files in a format of the user's, read by a function of the user's.

The function runs in a separate process (see `reader_process`); it is called once each time that
the data set is opened, and the rows that it gives are kept in a temporary file.
"""

import array
import base64
import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from prism_jax import errors, user_functions
from prism_jax.data import reader_process, records

Entry = tuple[int, dict[str, Any] | records.RowError]

# A function that gives no row for so long is ended.
_ROW_SECONDS = 600.0


class UserTable:
    """The rows that a function reads from a file: once in order, then by number. Thread-safe."""

    def __init__(self, path: str, function: user_functions.UserFunction):
        self.path = path
        self._function = function
        self._starts = array.array("q", [0])
        # Gone with this object: nothing but its descriptor names the file.
        descriptor, name = tempfile.mkstemp(prefix="prism_jax_rows.")
        os.unlink(name)
        self._rows = os.fdopen(descriptor, "w+b")
        self._lock = threading.Lock()

    def scan(self) -> Iterator[Entry]:
        """Yield each row's number, counted from 1, and its fields or the error in them.

        Raises:
          InputError: the function cannot be loaded, fails, or takes too long.
        """
        self._rows.truncate(0)
        self._rows.seek(0)
        self._starts = array.array("q", [0])
        for number, line in enumerate(self._lines(), start=1):
            with self._lock:
                self._rows.seek(self._starts[-1])
                self._rows.write(line)
            self._starts.append(self._starts[-1] + len(line))
            yield number, _parse(line)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, index: int) -> Entry:
        """Return a row by its index, counted from 0, as `scan` yields it."""
        with self._lock:
            self._rows.seek(self._starts[index])
            line = self._rows.read(self._starts[index + 1] - self._starts[index])
        return index + 1, _parse(line)

    def _lines(self) -> Iterator[bytes]:
        """Yield a line a row, until the function ends."""
        function, count = self._function, 0
        module = "prism_jax.data.reader_process"
        command = [sys.executable, "-m", module, function.path, function.name, self.path]
        with _started(command) as process:
            for line in _read_lines(process):
                if line is None:
                    raise self._error(count, f"no row for {_ROW_SECONDS} s")
                if line.startswith(b'{"end"'):
                    return
                if line.startswith(b'{"failed"'):
                    raise self._error(count, json.loads(line)["failed"])
                count += 1
                yield line
            raise self._error(count, f"the process ended with code {process.wait()}")

    def _error(self, count: int, problem: str) -> errors.InputError:
        return errors.InputError(f"{self.path}: {self._function} after {count} rows: {problem}")


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen]:
    """Start a process, and end it with the context."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _read_lines(process: subprocess.Popen) -> Iterator[bytes | None]:
    """Yield whole lines until the process ends; None when it gives nothing for too long."""
    pieces: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(_ROW_SECONDS):
                yield None
                return
            arrived = os.read(process.stdout.fileno(), 1 << 20)
            if not arrived:
                return
            *lines, rest = arrived.split(b"\n")
            for line in lines:
                yield b"".join([*pieces, line])
                pieces = []
            pieces.append(rest)


def _parse(line: bytes) -> dict[str, Any] | records.RowError:
    message = json.loads(line, object_hook=_with_bytes)
    if "wrong" in message:
        return records.RowError("bad_type", message["wrong"])
    return message["row"]


def _with_bytes(value: dict[str, Any]) -> Any:
    if list(value) == [reader_process.BYTES]:
        return base64.b64decode(value[reader_process.BYTES])
    return value
