"""Where the wall time of a run goes, added up over each start of the program."""

import contextlib
import datetime
import json
import pathlib
import time
from collections.abc import Iterator

import jax

# Tracing is left out: it nests, and its times would be added up twice.
_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Goodput:
    """The seconds of a run by part; the rest, "step", is the time in which the devices are busy.

    Each line of the file is the account of one start so far: {"started", "step", "lost_steps",
    "num_devices", "device_kind", "init_seconds", "compile_seconds", "data_seconds", "save_seconds",
    "evaluate_seconds", "step_seconds"}. The last line of each start counts.
    """

    def __init__(self, path: pathlib.Path | None, *, begun: float, lost_steps: int):
        """Start the account; everything from `begun` to now was "init".

        Args:
          path: file to append to; None on the processes that do not write.
          begun: `time.monotonic()` at the start of the program.
          lost_steps: steps of an earlier start that run again.
        """
        self._path = path
        self._begun = begun
        self._lost_steps = lost_steps
        self._started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._seconds = dict.fromkeys(("init", "compile", "data", "save", "evaluate"), 0.0)
        self._is_timing = False
        self._seconds["init"] = time.monotonic() - begun
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    @contextlib.contextmanager
    def spent_on(self, part: str) -> Iterator[None]:
        """Count the time inside the context as `part`."""
        start = time.monotonic()
        self._is_timing = True
        try:
            yield
        finally:
            self._is_timing = False
            self._seconds[part] += time.monotonic() - start

    def seconds(self) -> dict[str, float]:
        """Return the account so far by part; the parts add up to the life of the program."""
        total = time.monotonic() - self._begun
        return self._seconds | {"step": total - sum(self._seconds.values())}

    def write(self, step: int) -> None:
        """Append the account after `step` steps."""
        if self._path is None:
            return
        line = {"started": self._started, "step": step, "lost_steps": self._lost_steps}
        line |= {"num_devices": jax.device_count(), "device_kind": jax.devices()[0].device_kind}
        line |= {f"{part}_seconds": round(s, 3) for part, s in self.seconds().items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Stop listening to the compiler."""
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_: str | int) -> None:
        # Compilation inside another part (an evaluation's first) is counted there.
        if event in _COMPILE_EVENTS and not self._is_timing:
            self._seconds["compile"] += seconds
