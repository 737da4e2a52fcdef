"""One process of a job of `benchmarks.eight_gpus`: the program, watched.

    PRISM_EIGHT=settings.json python -m benchmarks.eight_process sft --config=…

The command is that of `python -m prism_jax`, and nothing is imported that it does not import
itself, but for stages that sample: their responses are forced, see `benchmarks.eight_responses`.
Added are notes, written after the first update and at the end: the time to the first update and
where it goes, the times of updates, rollouts and saves, and the peak memory of the devices.
"""

import dataclasses
import gc
import importlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from prism_jax import main as program
from prism_jax.checkpoints import checkpoint
from prism_jax.running import loop

SETTINGS = "PRISM_EIGHT"  # the variable that names the file of `Settings`
SAMPLING = ("align", "rlvr", "evaluate")  # the commands whose responses are forced

Notes = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The orders of the parent process to its children."""

    begun: float  # `time.time()` at the start of the job
    notes: str  # folder of the notes
    tokenizer: str  # folder
    mean_tokens: int  # of a response, before the limits
    # Steps after which the state is saved, each checkpoint in the place of the one before: the disk
    # may hold one alone. None: those of the configuration, and after the last.
    save_steps: list[int] | None
    last_step: int | None  # the process ends after it, as if it were the run's; None: as configured


class Watch:
    """The notes of this process; times are seconds since the start of the job."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._compile_seconds = 0.0
        self.notes: Notes = {
            "seconds_to": {},
            "compiler_seconds": {},
            "update_times": [],
            "update_seconds": [],
            "saves": [],
            "save_wait_times": [],
        }

    def now(self) -> float:
        """Return the seconds since the start of the job."""
        return time.time() - self._settings.begun

    def reached(self, name: str) -> None:
        """Note the time of a point on the way to the first update, once."""
        self.notes["seconds_to"].setdefault(name, self.now())

    def listen(self, event: str, seconds: float, **_: str | int) -> None:
        """Add up the seconds that JAX reports before the first update, and all of compiling."""
        if event.endswith("/backend_compile_duration"):
            self._compile_seconds += seconds
        if "first update" not in self.notes["seconds_to"] and "comp" in event:
            sums = self.notes["compiler_seconds"]
            sums[event] = sums.get(event, 0.0) + seconds

    def write(self) -> None:
        """Write the notes so far."""
        notes = self.notes | _devices() | {"seconds": self.now()}
        process = os.environ.get("PRISM_PROCESS_ID", "0")
        text = json.dumps(notes, indent=1)
        pathlib.Path(self._settings.notes, f"process_{process}.json").write_text(text + "\n")

    def install(self) -> None:
        """Watch the loop and the checkpoints of this process."""
        jax.monitoring.register_event_duration_secs_listener(self.listen)
        loop.restore_or_make = self._noting_state(loop.restore_or_make)
        loop.run = self._noting_updates(loop.run)
        saver = checkpoint.Checkpointer
        saver.wait = self._noting_waits(saver.wait)
        saver.save = self._noting_saves(saver.save)
        steps = self._settings.save_steps
        if steps is not None:
            saver.is_due = _due_after(saver.is_due, steps)
            if not steps:  # nothing that could be marked as finished
                saver.finish = lambda self, summary: None

    def _noting_state(self, restore_or_make: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args, **kwargs):
            self.reached("data opened")
            state = restore_or_make(*args, **kwargs)
            self.reached("state in memory")
            return state

        return noting

    def _noting_updates(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return `loop.run` that notes updates: the first, and those behind rollouts, to their end.

        Others are not waited for: the host prepares a step while the devices are at the one before.
        """
        notes = self.notes

        def run_noting(stage: loop.Stage, *args, **kwargs):
            def update(state, batch, key):
                self.reached("first batch")
                begun = self.now()
                notes["update_times"].append(begun)
                state, metrics = stage.update(state, batch, key)
                is_first = len(notes["update_times"]) == 1
                if is_first or notes.get("rollouts"):
                    jax.block_until_ready((state, metrics))
                    notes["update_seconds"].append(self.now() - begun)
                if is_first:
                    self.reached("first update")
                    self.write()
                if len(notes["update_times"]) == self._settings.last_step:
                    jax.block_until_ready(metrics)
                    raise SystemExit(0)
                return state, metrics

            return run(dataclasses.replace(stage, update=update), *args, **kwargs)

        return run_noting

    def _noting_waits(self, wait: Callable[..., None]) -> Callable[..., None]:
        def noting(saver):
            begun = self.now()
            wait(saver)
            self.notes["save_wait_times"].append([begun, self.now()])

        return noting

    def _noting_saves(self, save: Callable[..., None]) -> Callable[..., None]:
        steps = self._settings.save_steps

        def noting(saver, step, state, *, data_position):
            if steps is not None and step not in steps:
                return
            if steps is not None:
                saver.wait()
                for earlier in saver.steps():
                    saver._manager.delete(earlier)
            begun, compiled = self.now(), self._compile_seconds
            save(saver, step, state, data_position=data_position)
            self.notes["saves"].append(
                {
                    "step": step,
                    "times": [begun, self.now()],
                    "compile_seconds": self._compile_seconds - compiled,
                }
            )

        return noting


def _due_after(is_due: Callable[..., bool], steps: Sequence[int]) -> Callable[..., bool]:
    def due(saver, step):
        is_due(saver, step)  # which looks whether the last save is complete
        return step in steps

    return due


def _devices() -> Notes:
    """Return the devices of the job, and the peak memory of those of this process."""
    stats = {str(device.id): device.memory_stats() for device in jax.local_devices()}
    return {
        "device_kind": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        # A CPU reports none.
        "peak_bytes": {
            number: one["peak_bytes_in_use"] for number, one in stats.items() if one is not None
        },
    }


def main(argv: Sequence[str]) -> int:
    """Run a command of the program, watched; write the notes and return the exit code."""
    settings = Settings(**json.loads(pathlib.Path(os.environ[SETTINGS]).read_text()))
    watch = Watch(settings)
    importlib.import_module(f"prism_jax.{program.COMMANDS[argv[0]][0]}")
    watch.reached("imported")
    watch.install()
    responses = None
    if argv[0] in SAMPLING:
        # Loaded here, because it imports what other stages do not.
        responses = importlib.import_module("benchmarks.eight_responses")
        responses.install(settings.tokenizer, mean_tokens=settings.mean_tokens, notes=watch.notes)
    code = 1
    try:
        code = program.main(argv)
    finally:
        # Of a wrong input there is nothing to note, and JAX may not have started.
        if code != 2:
            watch.write()
    if code == 0 and responses is not None:
        gc.collect()  # the state of the run
        watch.notes["copy_bytes_a_second"] = responses.copy_rate()
        watch.write()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
