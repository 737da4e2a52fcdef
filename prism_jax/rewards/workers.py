"""Reward batches of responses: fast rules here, mathematics in processes that can be killed.

Most answers are decided in this process by rules of bounded cost. Only expressions that need
math-verify go to a worker. A worker that exceeds the deadline (`9^{9^9}`) is killed, a worker that
dies is replaced, and its task earns nothing and is counted; the rewards of the batch are always
returned, in order. No signal is used, so a trainer may call this from any thread (one at a time).
"""

import collections
import contextlib
import dataclasses
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence

from prism_jax import errors
from prism_jax.rewards import score

# For starting Python and sympy on a busy machine.
_START_SECONDS = 120.0


class _NeedsMathematicsError(Exception):
    """A task that the fast rules cannot decide."""


def _defer(method: str, answer: str, truth: str) -> bool:
    raise _NeedsMathematicsError


def _judge_here(question: score.Question) -> score.Reason | None:
    try:
        return score.judge(question, _defer)
    except Exception:
        # Mathematics is needed, or a rule failed: then the worker fails again and reports it.
        return None


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


class JudgePool:
    """A judge of responses with a fixed number of judging processes.

    Args:
        rule: of the rewards.
        num_workers: judging processes; they start at once, in the background.
        deadline_seconds: wall time for a task in a worker.
        memory_bytes: address space of a worker (`RLIMIT_AS`); beyond it a task is an error.
        module: the program of a worker.
    """

    def __init__(
        self,
        rule: score.Rule,
        *,
        num_workers: int,
        deadline_seconds: float,
        memory_bytes: int,
        module: str = "prism_jax.rewards.judge_process",
    ):
        if num_workers < 1:
            raise errors.InputError(f"rewards.num_workers must be >= 1, got {num_workers}")
        if deadline_seconds <= 0:
            raise errors.InputError(f"rewards.deadline_seconds must be > 0, got {deadline_seconds}")
        self._rule = rule
        self._deadline_seconds = deadline_seconds
        self._command = [sys.executable, "-m", module, str(deadline_seconds), str(memory_bytes)]
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self.num_restarts = 0
        for _ in range(num_workers):
            self._start()

    def __enter__(self) -> "JudgePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        for worker in self._workers:
            self._selector.unregister(worker.process.stdout)
            worker.end()
        self._workers = []
        self._selector.close()

    def grade(self, tasks: Sequence[score.Task]) -> list[score.Reward]:
        """Reward tasks, in order. Equal answers to equal truths are judged once."""
        screened = [score.screen(task, self._rule) for task in tasks]
        questions = [item for item in screened if isinstance(item, score.Question)]
        verdicts = dict(zip(questions, self.verdicts(questions), strict=True))
        reasons = [item if isinstance(item, score.Reason) else verdicts[item] for item in screened]
        return [
            score.reward(task, self._rule, reason)
            for task, reason in zip(tasks, reasons, strict=True)
        ]

    def verdicts(self, questions: Sequence[score.Question]) -> list[score.Reason]:
        """Judge questions, in order. Equal questions are judged once."""
        if not self._workers:
            raise RuntimeError("JudgePool was asked after close")
        reasons = {question: _judge_here(question) for question in dict.fromkeys(questions)}
        waiting = [question for question, reason in reasons.items() if reason is None]
        reasons |= zip(waiting, self._judge_elsewhere(waiting), strict=True)
        return [reasons[question] for question in questions]

    def _judge_elsewhere(self, questions: list[score.Question]) -> list[score.Reason]:
        lines = [
            json.dumps(dataclasses.asdict(question)).encode() + b"\n" for question in questions
        ]
        todo = collections.deque(range(len(lines)))
        reasons: dict[int, score.Reason] = {}
        try:
            while len(reasons) < len(lines):
                self._hand_out(todo, lines)
                for worker in self._wait():
                    self._collect(worker, reasons)
                self._end_late_workers(reasons)
        except BaseException:
            # Interrupted: replies to this batch must not be taken for replies to the next.
            self.close()
            raise
        return [reasons[index] for index in range(len(lines))]

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

    def _collect(self, worker: _Worker, reasons: dict[int, score.Reason]) -> None:
        messages, has_ended = worker.receive()
        for message in messages:
            if "ready" in message:
                worker.is_ready = True
            else:
                reasons[worker.request] = score.Reason(message["reason"])
                worker.request = None
        if has_ended:
            if worker.request is not None:
                reasons[worker.request] = score.Reason.ERROR
            self._replace(worker)

    def _end_late_workers(self, reasons: dict[int, score.Reason]) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if now < worker.deadline or (worker.is_ready and worker.request is None):
                continue
            if worker.request is not None:
                reasons[worker.request] = score.Reason.TIMEOUT
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
