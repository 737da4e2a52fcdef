"""SIGTERM: finish the step, save, leave with exit code 143.

A single process has a flag. Several processes agree on the step through the coordination service,
whose handler must not be replaced: no handler is installed then, and the checkpointer decides.
"""

import contextlib
import signal
import types
from collections.abc import Callable, Iterator

import jax

EXIT_CODE = 143  # 128 + SIGTERM; launchers start the job again


class Preempted(SystemExit):
    """The end of a program that SIGTERM stopped, after everything was saved."""

    def __init__(self, step: int):
        super().__init__(EXIT_CODE)
        self.step = step

    def __str__(self) -> str:
        return f"stopped by SIGTERM after step {self.step}, which is saved"


@contextlib.contextmanager
def watch(reached: Callable[[int], bool]) -> Iterator[Callable[[int], bool]]:
    """Yield a function (step) -> "is this job to stop now?", to be called once every step.

    A second SIGTERM kills the process at once; earlier checkpoints stay.

    Args:
      reached: the decision of all processes, `Checkpointer.reached_preemption`; called only when
        there are several.
    """
    if jax.process_count() > 1:
        yield reached
        return
    is_requested = False

    def note(signum: int, frame: types.FrameType | None) -> None:
        nonlocal is_requested
        is_requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda step: is_requested
    finally:
        signal.signal(signal.SIGTERM, before)
