"""The side of a judging process: requests and replies as JSON lines, and the process's limits.

The first reply says that the process is ready, or with `failed` why it cannot start.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

Json = Any


def open_pipes(*, prints_to: int) -> tuple[TextIO, TextIO]:
    """Return the pipes of requests and replies; nothing else may read or write them.

    Args:
      prints_to: descriptor that gets what a library or a function prints.
    """
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(prints_to, 1)
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
    return requests, replies


def limit_memory(memory_bytes: int) -> None:
    """Limit the address space of this process."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def reply(replies: TextIO, message: dict[str, Json]) -> None:
    """Send a message."""
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def receive(requests: TextIO, *, deadline_seconds: float, num_threads: int) -> Iterator[Json]:
    """Yield requests until there are no more.

    The kernel ends this process if the parent, which keeps the deadline, has died.

    Args:
      num_threads: that may use the processor at the same time.
    """
    for line in requests:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        limit = math.ceil(time.process_time() + 2 * deadline_seconds * num_threads + 1)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
        yield json.loads(line)
