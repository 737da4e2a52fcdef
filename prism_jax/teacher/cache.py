"""Replies on disk, each under the hash of its request: nothing that was paid is asked again.

An entry is a file of its own, there whole or not at all, so a process may be killed at any moment
and several may share a folder.
"""

import dataclasses
import json
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

from prism_jax import errors
from prism_jax.teacher import reply

Json = Any
_LOST = "unusable.jsonl"


class Cache:
    """Keep replies below a folder. Safe to use from any thread."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> reply.Reply | None:
        """Return the reply to a request, None where there is none.

        Raises:
          InputError: the entry is damaged.
        """
        path = self._path(key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return _read(text, path)[1]

    def put(self, key: str, *, model: str, found: reply.Reply) -> None:
        """Write the reply to a request for a model, by the name it was asked under."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
        entry = {"asked_model": model, "reply": dataclasses.asdict(found)}
        with partial.open("w", encoding="utf-8") as file:
            json.dump(entry, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def put_unusable(self, *, model: str, usage: reply.Usage) -> None:
        """Note what a reply without a text cost."""
        line = json.dumps({"asked_model": model, "usage": dataclasses.asdict(usage)})
        with self._lock, (self._folder / _LOST).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def usages(self, *, model: str) -> Iterator[reply.Usage]:
        """Yield what every reply of a model counted, those without a text included."""
        for path in self._folder.glob("*/*.json"):
            asked, found = _read(path.read_text(encoding="utf-8"), path)
            if asked == model and found.usage is not None:
                yield found.usage
        lost = self._folder / _LOST
        for line in lost.read_text(encoding="utf-8").splitlines() if lost.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # The process was killed while it wrote the line.
                continue
            if entry["asked_model"] == model:
                yield reply.Usage(**entry["usage"])

    def _path(self, key: str) -> pathlib.Path:
        return self._folder / key[:2] / f"{key}.json"


def _read(text: str, path: pathlib.Path) -> tuple[str, reply.Reply]:
    try:
        entry = json.loads(text)
        usage = entry["reply"]["usage"]
        found = reply.Reply(**entry["reply"])
        counted = None if usage is None else reply.Usage(**usage)
        return entry["asked_model"], dataclasses.replace(found, usage=counted)
    except (ValueError, KeyError, TypeError) as error:
        raise errors.InputError(f"{path}: damaged; delete it to have it asked again") from error
