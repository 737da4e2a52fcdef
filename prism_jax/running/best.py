"""The best step of a run by its evaluations, and whether to stop.

`best.json` in the run's folder names the best step and lists all evaluations. Process 0 decides,
and all processes get its word. A resumed run drops the evaluations of steps that it runs again, so
it decides as the run that was not interrupted.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from prism_jax import errors, progress, small_files
from prism_jax.checkpoints import best_step
from prism_jax.setup import agreement

Json = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The decision after an evaluation."""

    is_best: bool  # its state is saved and kept
    is_over: bool  # the run ends here


NOTHING = Verdict(is_best=False, is_over=False)


class Best:
    """The evaluations of a run; higher values are better, of equal ones the first is the best."""

    def __init__(self, folder: pathlib.Path, *, metric: str, is_kept: bool, patience: int | None):
        """Start without evaluations.

        Args:
          folder: of the run.
          metric: name of the value that is compared.
          is_kept: the state of the best step is saved, and kept until there is a better one.
          patience: evaluations in a row without a better one that end the run; None: it goes on.
        """
        self._path, self._metric = folder / best_step.NAME, metric
        self._is_kept, self._patience = is_kept, patience
        self._seen: list[tuple[int, float]] = []

    def begin(self, first_step: int) -> None:
        """Read the evaluations of the steps before; every process calls this."""

        def read() -> Json:
            known = small_files.read(
                self._path, best_step.SCHEMA, remedy="delete it, and the best step is found anew"
            )
            seen = [] if known is None else known["evaluations"]
            kept = [entry for entry in seen if entry[0] <= first_step]
            if known is not None and len(kept) < len(seen):
                self._write([(int(step), value) for step, value in kept])
            return kept

        kept = agreement.on_first("best_begin", read)
        self._seen = [(int(step), value) for step, value in kept]

    @property
    def step(self) -> int | None:
        """Return the best step; None before the first evaluation."""
        return _best(self._seen)[0] if self._seen else None

    @property
    def kept_step(self) -> int | None:
        """Return the step whose state must not be removed; None: there is none."""
        return self.step if self._is_kept else None

    @property
    def is_over(self) -> bool:
        """Return whether the last evaluations were not better than those before them."""
        if self._patience is None or not self._seen:
            return False
        steps = [step for step, _ in self._seen]
        return len(steps) - 1 - steps.index(self.step) >= self._patience

    def add(self, step: int, values: Mapping[str, float]) -> tuple[Verdict, dict[str, float]]:
        """Return the verdict that follows from the evaluation of a step, and values for its row."""
        value = float(values[self._metric])

        def decide() -> Json:
            # Of process 0 alone, should the others' value differ in its last bit.
            if not math.isfinite(value):
                raise errors.RunError(f"{self._metric} is {value} after step {step}")
            seen = [*self._seen, (step, value)]
            self._write(seen)
            return seen

        seen = agreement.on_first("best", decide)
        self._seen = [(int(number), known) for number, known in seen]
        best_step, best_value = _best(self._seen)
        if self.is_over:
            progress.say(
                f"{self._metric} has not risen for {self._patience} evaluations: the run ends "
                f"after step {step}; the best was {best_value:.4g} after step {best_step}"
            )
        verdict = Verdict(is_best=self._is_kept and best_step == step, is_over=self.is_over)
        return verdict, {"eval/best_step": float(best_step), "eval/best": best_value}

    def summary(self) -> dict[str, Json]:
        """Return the best step and its value, for the record of a finished run."""
        if not self._seen:
            return {}
        step, value = _best(self._seen)
        return {
            "best_step": step,
            "best_value": value,
            "metric": self._metric,
            "is_stopped_early": self.is_over,
        }

    def _write(self, seen: list[tuple[int, float]]) -> None:
        if not seen:
            self._path.unlink(missing_ok=True)
            return
        step, value = _best(seen)
        evaluations = [list(entry) for entry in seen]
        small_files.write(
            self._path,
            {"step": step, "metric": self._metric, "value": value, "evaluations": evaluations},
        )


def _best(seen: list[tuple[int, float]]) -> tuple[int, float]:
    return max(seen, key=lambda entry: (entry[1], -entry[0]))
