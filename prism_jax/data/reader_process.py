"""Call a function of the user's that reads a file, and send its rows to standard output.

    def FUNCTION(path: str) -> iterable of dicts

A row is a dict in the published form of its kind, with JSON values and bytes. Each output line is
`{"row": …}`, or `{"wrong": …}` for a row that is not one; the last is `{"end": true}` or
`{"failed": …}`. What the function prints goes to standard error. `user_tables.py` starts this.

    python -m prism_jax.data.reader_process FILE FUNCTION PATH
"""

import base64
import json
import numbers
import os
import sys
from typing import Any

from prism_jax import user_functions

# The only key of an object that stands for bytes.
BYTES = "base64 of bytes"


def main(arguments: list[str]) -> None:
    """Send all rows of a file."""
    file, name, path = arguments
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    end: dict[str, Any] = {"end": True}
    try:
        for row in user_functions.load(file, name)(path):
            lines.write(_line(row))
            lines.flush()
    except BaseException as error:  # a file may also exit
        end = {"failed": user_functions.describe(error, file)}
    lines.write(json.dumps(end) + "\n")
    lines.flush()


def _line(row: Any) -> str:
    if not isinstance(row, dict):
        return json.dumps({"wrong": f"a row must be a dict, got {type(row).__name__}"}) + "\n"
    try:
        return json.dumps({"row": row}, default=_plain) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        return json.dumps({"wrong": f"a row must have JSON values and bytes: {error}"}) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return {BYTES: base64.b64encode(value).decode()}
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"got {type(value).__name__}")


if __name__ == "__main__":
    main(sys.argv[1:])
