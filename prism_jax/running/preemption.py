"""SIGTERM: stop before or after the step's update, save, leave with exit code 143.

One process has its own flag. Several processes agree on where they stop through the coordination
service, whose handler must not be replaced: there nothing is installed.
"""

import contextlib
import signal
import types
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 143  # 128 + SIGTERM, what launchers restart


class Preempted(SystemExit):
    """Leave the program after everything was saved."""

    def __init__(self, step: int):
        super().__init__(EXIT_CODE)
        self.step = step

    def __str__(self) -> str:
        if self.step == 0:
            return "stopped by SIGTERM before the first step was done"
        return f"stopped by SIGTERM after step {self.step}, which is saved"


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
    """Yield a function (number) -> "is this job to stop here?".

    Every process calls it at the same places, with numbers that rise by one; all get True at the
    same place, soon after a SIGTERM to any of them. In a job of one process a second SIGTERM kills
    it at once: what was saved stays as it is.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    is_requested = False

    def note(signum: int, frame: types.FrameType | None) -> None:
        nonlocal is_requested
        is_requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda number: is_requested
    finally:
        signal.signal(signal.SIGTERM, before)
