"""Processes that answer requests and can be killed: each request costs its deadline at most.

A process that exceeds the deadline is killed, one that dies is replaced, and the reply to its
request says so; the replies of a batch are always returned, in order. No signal is used, so a
trainer may call this from any thread (one at a time).
"""

import collections
import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from prism_jax import errors

Json = Any

# For starting Python and the libraries on a busy machine.
_START_SECONDS = 120.0


class _Worker:
    """A judging process and its current request.

    Until it is ready, the process writes its errors to this process's standard error.
    """

    def __init__(self, command: list[str], environment: dict[str, str]):
        # In a new session, so that only the parent handles Ctrl-C in a terminal.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        self.is_ready = False
        self.request: int | None = None
        self.deadline = time.monotonic() + _START_SECONDS
        self._received = b""

    def send(self, index: int, line: bytes, deadline: float) -> bool:
        """Send a request; return False if the process has ended."""
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        self.request, self.deadline = index, deadline
        return True

    def receive(self) -> tuple[list[dict], bool]:
        """Return the complete messages that have arrived, and whether the process has ended."""
        arrived = self.process.stdout.read()
        if arrived is None:
            return [], False
        *lines, self._received = (self._received + arrived).split(b"\n")
        return [json.loads(line) for line in lines], not arrived

    def end(self) -> None:
        """Kill the process and release its pipes."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Pool:
    """A fixed number of processes that run one program; see `protocol` for its side.

    Args:
      command: the module of the program and its arguments.
      num_workers: processes; they start at once, in the background.
      deadline_seconds: wall time for a request.
    """

    def __init__(self, command: Sequence[str], *, num_workers: int, deadline_seconds: float):
        if num_workers < 1:
            raise errors.InputError(f"rewards.num_workers must be >= 1, got {num_workers}")
        if deadline_seconds <= 0:
            raise errors.InputError(f"rewards.deadline_seconds must be > 0, got {deadline_seconds}")
        self._deadline_seconds = deadline_seconds
        self._command = [sys.executable, "-m", *command]
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self.num_restarts = 0
        for _ in range(num_workers):
            self._start()

    @property
    def process_ids(self) -> list[int]:
        """Return the ids of the processes; none after `close`."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End the processes; a second call does nothing."""
        for worker in self._workers:
            self._selector.unregister(worker.process.stdout)
            worker.end()
        self._workers = []
        self._selector.close()

    def ask(self, requests: Sequence[Json]) -> list[dict[str, Json]]:
        """Return the replies to requests, in order.

        Where there is none the reply is `{"reason": "timeout" or "error", "detail": …}`.

        Raises:
          InputError: the program says that it cannot start.
        """
        if not self._workers:
            raise RuntimeError("the pool was used after close")
        lines = [json.dumps(request).encode() + b"\n" for request in requests]
        todo = collections.deque(range(len(lines)))
        replies: dict[int, dict[str, Json]] = {}
        try:
            while len(replies) < len(lines):
                self._hand_out(todo, lines)
                for worker in self._wait():
                    self._collect(worker, replies)
                self._end_late_workers(replies)
        except BaseException:
            # Interrupted: replies to this batch must not be taken for replies to the next.
            self.close()
            raise
        return [replies[index] for index in range(len(lines))]

    def _hand_out(self, todo: collections.deque[int], lines: list[bytes]) -> None:
        for worker in list(self._workers):
            if not todo or not worker.is_ready or worker.request is not None:
                continue
            deadline = time.monotonic() + self._deadline_seconds
            if worker.send(todo[0], lines[todo[0]], deadline):
                todo.popleft()
            else:
                self._replace(worker)

    def _wait(self) -> list[_Worker]:
        """Return the workers with messages, at the latest when the next deadline passes."""
        busy = [w.deadline for w in self._workers if w.request is not None or not w.is_ready]
        seconds = max(0.0, min(busy) - time.monotonic()) if busy else 0.0
        return [key.data for key, _ in self._selector.select(seconds)]

    def _collect(self, worker: _Worker, replies: dict[int, dict[str, Json]]) -> None:
        messages, has_ended = worker.receive()
        for message in messages:
            if "failed" in message:
                raise errors.InputError(message["failed"])
            if "ready" in message:
                worker.is_ready = True
            else:
                replies[worker.request] = message
                worker.request = None
        if has_ended:
            if worker.request is not None:
                code = worker.process.wait()
                detail = f"the process ended with code {code}"
                replies[worker.request] = {"reason": "error", "detail": detail}
            self._replace(worker)

    def _end_late_workers(self, replies: dict[int, dict[str, Json]]) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if now < worker.deadline or (worker.is_ready and worker.request is None):
                continue
            if worker.request is not None:
                detail = f"no answer within {self._deadline_seconds} s"
                replies[worker.request] = {"reason": "timeout", "detail": detail}
            self._replace(worker)

    def _start(self) -> None:
        worker = _Worker(self._command, self._environment)
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _replace(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.process.stdout)
        worker.end()
        if not worker.is_ready:
            self.close()
            raise RuntimeError(
                f"a judging process could not start within {_START_SECONDS} s; "
                "see its messages on standard error"
            )
        self.num_restarts += 1
        self._start()
