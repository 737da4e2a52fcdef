"""The progress of a run on standard error, with the few metrics that a user watches."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

_BAR_CHARS = 24
_SMOOTHING = 0.1


class Progress:
    """A progress line: redrawn on a terminal, written every few steps elsewhere."""

    def __init__(
        self,
        stream: TextIO | None,
        *,
        title: str,
        first_step: int,
        num_steps: int,
        watched: Sequence[str],
        line_every_steps: int,
    ):
        """Start the clock.

        Args:
          stream: standard error, or None to be silent (processes other than the first).
          title: name of the run, such as "sft".
          first_step: steps done before this start.
          num_steps: steps of the whole run.
          watched: names of the metrics to show, as far as a step has them.
          line_every_steps: steps between lines when the stream is not a terminal.
        """
        self._stream = stream
        self._title = title
        self._num_steps = num_steps
        self._watched = tuple(watched)
        self._line_every_steps = line_every_steps
        self._is_terminal = stream is not None and stream.isatty()
        self._last_step = first_step
        self._last_time = time.monotonic()
        self._step_seconds: float | None = None
        self._drawn_chars = 0

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show the state after `step` steps."""
        self._measure(step)
        if self._stream is None:
            return
        text = self._text(step, values)
        if self._is_terminal:
            self._stream.write("\r" + text.ljust(self._drawn_chars))
            self._drawn_chars = len(text)
        elif step % self._line_every_steps == 0 or step == self._num_steps:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Keep the line and move to the next."""
        if self._is_terminal and self._drawn_chars:
            self._stream.write("\n")
            self._stream.flush()

    def _measure(self, step: int) -> None:
        now = time.monotonic()
        seconds = (now - self._last_time) / max(1, step - self._last_step)
        # The first step includes compilation, so it does not count for the remaining time.
        if self._step_seconds is None:
            self._step_seconds = math.inf
        elif math.isinf(self._step_seconds):
            self._step_seconds = seconds
        else:
            self._step_seconds += _SMOOTHING * (seconds - self._step_seconds)
        self._last_step, self._last_time = step, now

    def _text(self, step: int, values: Mapping[str, float]) -> str:
        done = step / max(1, self._num_steps)
        bar = "#" * int(done * _BAR_CHARS)
        left = (self._num_steps - step) * self._step_seconds if step < self._num_steps else 0.0
        shown = [f"{name} {values[name]:.4g}" for name in self._watched if name in values]
        parts = [f"{self._title} [{bar.ljust(_BAR_CHARS, '.')}] {step}/{self._num_steps}"]
        parts += [f"{duration(left)} left"] if math.isfinite(left) else []
        return "  ".join(parts + shown)


def duration(seconds: float) -> str:
    """Write a time as "7s", "3m05s" or "2h04m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def say(line: str) -> None:
    """Print a line for the user on standard error, from process 0 only."""
    # A command that never loads JAX, such as a teacher's, is a single process.
    jax = sys.modules.get("jax")
    if jax is None or jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)
