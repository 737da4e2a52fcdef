"""The small files of this project: written whole and durably, read with a schema.

A schema describes the parts of a JSON value that a reader uses:

    int, float, str, bool, dict     a value of that type; a float is finite, and may be whole
    NUMBER                          a float, or the text that stands for NaN or infinity
    None                            anything
    {"key": schema, "key?": …}      an object with at least these keys; those with ? are optional
    {"key": …, str: schema}         the same, and a schema for all other keys
    [schema]                        a list of such values
    (schema, …)                     one of several; `type(None)` is null
    frozenset of texts              one of these texts

A value that does not fit is damage, or another program's file: one InputError names the file.
"""

import contextlib
import errno
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prism_jax import errors

Json = Any
Schema = Any
Path = Any  # pathlib.Path or epath.Path

_NOT_FINITE = ("NaN", "Infinity", "-Infinity")
_SHOWN_CHARS = 60


def is_number(value: Json) -> bool:
    """Return whether `float` reads the value as `metrics.jsonl` means it."""
    return _is_float(value) or (isinstance(value, str) and value in _NOT_FINITE)


NUMBER: Callable[[Json], bool] = is_number


def read(path: Path, schema: Schema, *, remedy: str = "") -> Json | None:
    """Return the JSON of a file, None where there is none.

    Args:
      remedy: advice to the user, for the message.

    Raises:
      InputError: the file cannot be read, or does not fit the schema.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise errors.InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse(data, schema, where=str(path), remedy=remedy)


def read_lines(path: Path, schema: Schema) -> list[Json]:
    """Return the rows of a JSON lines file, none where it does not exist.

    A last line without a line break was cut off by a kill; it is left out.

    Raises:
      InputError: the file cannot be read, or a line does not fit the schema.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise errors.InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    lines = data.split(b"\n")[:-1]
    return [
        parse(line, schema, where=f"{path}: line {number}")
        for number, line in enumerate(lines, start=1)
    ]


def parse(data: bytes, schema: Schema, *, where: str, remedy: str = "") -> Json:
    """Return the JSON value of some bytes; InputError when it does not fit the schema."""
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        reason = str(error)[:_SHOWN_CHARS]
        raise errors.InputError(f"{where}: damaged, not JSON ({reason}){_after(remedy)}") from error
    problem = problem_of(value, schema)
    if problem is not None:
        raise errors.InputError(f"{where}: damaged: {problem}{_after(remedy)}")
    return value


def problem_of(value: Json, schema: Schema, *, name: str = "") -> str | None:
    """Return the first difference between a value and a schema, None if it fits."""
    if isinstance(schema, Mapping):
        return _object_problem(value, schema, name)
    if isinstance(schema, list):
        if not isinstance(value, list):
            return _mismatch(name, "must be a list", value)
        problems = (problem_of(item, schema[0], name=f"{name}[]") for item in value)
        return next((problem for problem in problems if problem is not None), None)
    if isinstance(schema, tuple):
        problems = [problem_of(value, choice, name=name) for choice in schema]
        return None if None in problems else problems[0]
    if isinstance(schema, frozenset):
        is_one = isinstance(value, str) and value in schema
        return (
            None
            if is_one
            else _mismatch(name, f"must be one of {', '.join(sorted(schema))}", value)
        )
    if schema is None or _is_of(value, schema):
        return None
    kind = "a number" if schema in (float, NUMBER) else schema.__name__
    return _mismatch(name, f"must be {'null' if schema is type(None) else kind}", value)


def _object_problem(value: Json, schema: Mapping, name: str) -> str | None:
    if not isinstance(value, Mapping):
        return _mismatch(name, "must be an object", value)
    start = f"{name}." if name else ""
    named = {key.removesuffix("?"): key for key in schema if key is not str}
    missing = [key for key, given in named.items() if key == given and key not in value]
    if missing:
        return f"{start}{missing[0]} is missing"
    others = schema.get(str)
    for key, item in value.items():
        problem = problem_of(
            item,
            schema[named[key]] if key in named else others,
            name=f"{start}{key[:_SHOWN_CHARS]}",
        )
        if problem is not None:
            return problem
    return None


def dumps(value: Json, *, indent: int | None = None) -> bytes:
    """Return JSON as UTF-8; a lone surrogate stays an escape."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")


def write(path: Path, value: Json) -> None:
    """Write a JSON value as a whole file; see `replace`."""
    replace(path, dumps(value, indent=1) + b"\n")


def replace(path: Path, content: bytes, *, writer: str = "") -> None:
    """Write a small file as a whole or not at all, even through a power cut.

    Args:
      writer: a name that differs between concurrent writers of the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" in str(path):  # an object appears when it is complete
        path.write_bytes(content)
        return
    with replacing(path, writer=writer) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path, *, writer: str = "") -> Iterator[Any]:
    """Yield a binary file that replaces `path` when the context ends without an error."""
    target = pathlib.Path(path)
    partial = target.with_name(f"{target.name}{writer and '.'}{writer}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)
    sync(target.parent)


def rename_folder(partial: pathlib.Path, target: pathlib.Path) -> None:
    """Give a folder its final name once everything in it is on the disk."""
    for path in (*partial.rglob("*"), partial):
        sync(path)
    os.rename(partial, target)
    sync(target.absolute().parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, if the system can tell."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _is_of(value: Json, schema: Schema) -> bool:
    if schema is float:
        return _is_float(value)
    if schema is NUMBER:
        return is_number(value)
    return type(value) is schema and (schema is not int or abs(value) < 2**63)


def _is_float(value: Json) -> bool:
    """Return whether a value is a number small enough that many can be added up as floats."""
    is_number = type(value) in (int, float)
    return is_number and (type(value) is int or math.isfinite(value)) and abs(value) <= 10**300


def _mismatch(name: str, rule: str, value: Json) -> str:
    is_part = isinstance(value, list | dict)
    shown = type(value).__name__ if is_part else f"{value!r:.{_SHOWN_CHARS}}"
    return f"{name or 'the value'} {rule}, got {shown}"


def _after(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""
