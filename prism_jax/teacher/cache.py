"""A cache of replies on disk, keyed by the hash of the request: no reply is paid for twice.

Each entry is a file that is written atomically, so a process may be killed at any moment and
several may share a folder.
"""

import dataclasses
import json
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any, get_args

from prism_jax import small_files
from prism_jax.teacher import reply

Json = Any
_LOST = "unusable.jsonl"
_USAGE = {"input_tokens": int, "output_tokens": int}
_LOST_LINE = {"asked_model": str, "usage": _USAGE}
_ENTRY = {
    "asked_model": str,
    "reply": {
        "text": str,
        "finish": frozenset(get_args(reply.Finish)),
        "model": (str, type(None)),
        "usage": (type(None), _USAGE),
    },
}


class Cache:
    """The replies in a folder. Thread-safe."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> reply.Reply | None:
        """Return the reply to a request, None if there is none.

        Raises:
          InputError: the entry is damaged.
        """
        path = self._path(key)
        entry = _read(path)
        return None if entry is None else entry[1]

    def put(self, key: str, received: reply.Reply, *, model: str) -> None:
        """Write the reply to a request; `model` is the name that the request used."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        entry = {"asked_model": model, "reply": dataclasses.asdict(received)}
        writer = f"{os.getpid()}.{threading.get_ident()}"
        small_files.replace(path, json.dumps(entry).encode(), writer=writer)

    def put_unusable(self, *, model: str, usage: reply.Usage) -> None:
        """Record the usage of a reply without text."""
        line = json.dumps({"asked_model": model, "usage": dataclasses.asdict(usage)})
        with self._lock, (self._folder / _LOST).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def usages(self, *, model: str) -> Iterator[reply.Usage]:
        """Yield the usage of all replies of a model, those without text included."""
        for path in self._folder.glob("*/*.json"):
            entry = _read(path)
            if entry is not None and entry[0] == model and entry[1].usage is not None:
                yield entry[1].usage
        lost = self._folder / _LOST
        lines = lost.read_bytes().splitlines() if lost.exists() else ()
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line)
            except (ValueError, RecursionError):  # The process was killed while writing the line.
                continue
            entry = small_files.parse(line, _LOST_LINE, where=f"{lost}: line {number}")
            if entry["asked_model"] == model:
                yield _usage(entry["usage"])

    def _path(self, key: str) -> pathlib.Path:
        return self._folder / key[:2] / f"{key}.json"


def _read(path: pathlib.Path) -> tuple[str, reply.Reply] | None:
    entry = small_files.read(path, _ENTRY, remedy="delete it to request it again")
    if entry is None:
        return None
    stored = entry["reply"]
    return entry["asked_model"], reply.Reply(
        text=stored["text"],
        finish=stored["finish"],
        model=stored["model"],
        usage=None if stored["usage"] is None else _usage(stored["usage"]),
    )


def _usage(stored: Json) -> reply.Usage:
    return reply.Usage(input_tokens=stored["input_tokens"], output_tokens=stored["output_tokens"])
