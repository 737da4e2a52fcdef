"""SIGTERM: stop before or after the step's update, save, leave with exit code 143.

A single process has a flag. Several processes agree on where they stop through the coordination
service, whose handler must not be replaced: no handler is installed then.
"""

import contextlib
import signal
import types
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 143  # 128 + SIGTERM; launchers start the job again


class Preempted(SystemExit):
    """The end of a program that SIGTERM stopped, after everything was saved."""

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
    same place, soon after a SIGTERM to any of them. A second SIGTERM kills a job of one process at
    once; earlier checkpoints stay.
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
