"""Peers of a benchmark: programs of their own, and the time of a work that they do batch by batch.

A peer prints a line of JSON for each result as soon as it has it, so one that is ended, or fails,
leaves what it measured before.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

_ERROR_CHARS = 3000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """The results of a peer, in order; why it has no more, None where it came to its end."""

    lines: list[dict[str, Any]]
    error: str | None

    def of(self, case: str) -> list[dict[str, Any]]:
        """Return the results whose `case` this is."""
        return [line for line in self.lines if line.get("case") == case]


def run(module: str, options: Sequence[str], *, limit_seconds: float) -> Results:
    """Run a peer as a process that ends before JAX takes the memory here; show its results.

    Args:
      limit_seconds: after which it is killed.
    """
    command = [sys.executable, "-m", module, *options]
    lines = []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        clock = threading.Timer(limit_seconds, child.kill)
        clock.start()
        for text in child.stdout:
            # Libraries print too.
            if text.startswith('{"case"'):
                lines.append(json.loads(text))
                print(f"{module}: {text.strip()}", file=sys.stderr, flush=True)
        code = child.wait()
        is_late = not clock.is_alive()
        clock.cancel()
        errors.seek(0)
        error = f"exit code {code}: {errors.read()[-_ERROR_CHARS:]}" if code else None
    if error is not None and is_late:
        error = f"killed after {limit_seconds:.0f} s"
    if error is not None:
        print(f"{module}: {error}", file=sys.stderr, flush=True)
    return Results(lines=lines, error=error)


def batched_seconds(
    lengths: Sequence[int],
    rows: int,
    *,
    prefill_seconds: float,
    steps: Sequence[tuple[int, float]],
) -> float:
    """Return the seconds of responses drawn `rows` at a time, each batch to its longest.

    Args:
      lengths: tokens of the responses, in the order of the batches.
      prefill_seconds: of a batch, its first token included.
      steps: (new tokens before it, seconds) of measured steps, in order; between them the time is
        interpolated, beyond the last it is the last's.
    """
    places, seconds = zip(*steps, strict=True)
    total = 0.0
    for first in range(0, len(lengths), rows):
        longest = max(lengths[first : first + rows])
        total += prefill_seconds + np.interp(np.arange(1, longest), places, seconds).sum()
    return float(total)
