"""The one training loop: it knows steps, files and signals, and no algorithm.

    for step in range(first, total):
        batch, experience_metrics = stage.experience(state, next(data), key of this step)
        stop here on SIGTERM, with the state as it is saved
        state, update_metrics = stage.update(state, batch, key of this step)
        log, evaluate, save; or stop here

Step numbers in logs and checkpoints count finished steps: row 1 and checkpoint 1 are those of the
first step.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from prism_jax import errors, metrics, progress
from prism_jax.checkpoints import checkpoint
from prism_jax.running import best as best_lib
from prism_jax.running import goodput, metric_writers, preemption
from prism_jax.setup import agreement

State = Any
Batch = Any
Json = Any


class DivergedError(errors.RunError):
    """The error of a run in which too many updates in a row were not finite."""


class Data(Protocol):
    """The batches of a run, with their position as JSON."""

    def __next__(self) -> Batch:
        """Return the next batch, leaves on the device or the host."""

    def get_state(self) -> Json:
        """Return the position after the last batch returned, not after the last one prefetched."""

    def set_state(self, state: Json) -> None:
        """Continue after that position."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """The functions of a stage; the state has any form that the stage gives it."""

    # (state, batch, key) -> (batch to learn from, metrics); `learn_from_data` for supervised stages
    experience: Callable[[State, Batch, jax.Array], tuple[Batch, metrics.Metrics]]
    # (state, batch, key) -> (state, metrics); may donate the state
    update: Callable[[State, Batch, jax.Array], tuple[State, metrics.Metrics]]
    # (state, finished steps) -> values for the row of that step; None: no evaluation
    evaluate: Callable[[State, int], Mapping[str, float]] | None
    # metrics that count the updates skipped in a row; each step has all of them
    skip_counters: tuple[str, ...]
    # compares the evaluations, see `running.best`; None: no state is kept for its value
    best: best_lib.Best | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The end of a run."""

    num_steps: int  # of the whole run, those of earlier starts included
    evaluate_every_steps: int | None  # None: never; otherwise also after the last step
    max_skipped_in_row: int  # the run ends with an error when a skip counter reaches it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logs:
    """The destinations of the metrics."""

    writers: metric_writers.Writers
    progress: progress.Progress
    goodput: goodput.Goodput


def learn_from_data(state: State, batch: Batch, key: jax.Array) -> tuple[Batch, metrics.Metrics]:
    """Return the batch as it is: the experience of a supervised stage."""
    del state, key
    return batch, {}


def restore_or_make(
    checkpointer: checkpoint.Checkpointer,
    data: Data,
    *,
    abstract_state: State,
    make_state: Callable[[], State],
    step: int | None,
) -> tuple[State, int]:
    """Return the state to start from and its number of finished steps, and put the data there.

    Args:
      checkpointer: of the run's folder.
      data: moved to the position that belongs to a restored state.
      abstract_state: shapes, dtypes and shardings, see `Checkpointer.restore`.
      make_state: makes the state of a new run; not called when there is one to restore.
      step: an older checkpoint to go back to; None for the newest.
    """
    restored = checkpointer.restore(abstract_state, step=step)
    if restored is None:
        return make_state(), 0
    _check_position(restored.data_position, restored.step)
    data.set_state(restored.data_position)
    return restored.state, restored.step


def _check_position(position: Json, step: int) -> None:
    """Refuse a position that counts batches and is not that of the step.

    RLVR that fills its groups up takes any number of batches a step, and holds a surplus.
    """
    if not isinstance(position, Mapping) or "surplus" in position:
        return
    if position.get("next_step", step) != step:
        raise errors.InputError(
            f"cannot resume: the data stand before step {position['next_step']} in the "
            f"checkpoint of step {step}"
        )


def run(
    stage: Stage,
    state: State,
    data: Data,
    *,
    key: jax.Array,
    first_step: int,
    limits: Limits,
    checkpointer: checkpoint.Checkpointer,
    save_every_minutes: float | None,
    logs: Logs,
    inputs: agreement.Inputs,
) -> State:
    """Train from `first_step` finished steps to `limits.num_steps`; return the last state, saved.

    A run that is interrupted and started again passes through the same states, bit for bit on the
    same mesh: the keys depend on the step alone, the data position is saved with the state, and
    the rows of a checkpoint's steps are on disk before the checkpoint is.

    Metrics are read one step late, while the devices work on the next step. `time/step_seconds`
    goes from the step's begin, or the end of the step before where that is later, to the end of
    its update: it holds its data and its experience, but no evaluation and no saving.

    Args:
      save_every_minutes: besides the steps of the checkpointer; None: never.
      inputs: the data that the stage notes of each step, compared among the processes.

    Raises:
      DivergedError: `limits.max_skipped_in_row` updates in a row were skipped.
      CheckpointError: saving failed; the run does not continue unsaved.
      Preempted: SIGTERM came; the state is saved.
      InputError: the data ended too early.
      RunError: the data of a step differ among the processes.
    """
    with (
        concurrent.futures.ThreadPoolExecutor(1) as watcher,
        preemption.watch() as is_preempted,
    ):
        pending = _Pending(stage, limits, logs, inputs, watcher)
        clock = _SaveClock(save_every_minutes)

        def save(step: int, state: State, data_position: Json, *, is_stopping: bool) -> None:
            pending.flush()
            with logs.goodput.spent_on("save"):
                logs.writers.sync()
                checkpointer.save(step, state, data_position=data_position)
                if is_stopping:
                    checkpointer.wait()
            logs.goodput.write(step)
            clock.restart()
            pending.is_save_due = False
            if is_stopping:
                raise preemption.Preempted(step)

        for step in range(first_step, _end(stage, first_step, limits, checkpointer)):
            begun = time.monotonic()
            position = data.get_state()
            experience_key, update_key = jax.random.split(jax.random.fold_in(key, step))
            with logs.goodput.spent_on("data"):
                batch = _next_batch(data, step)
            data_seconds = time.monotonic() - begun
            batch, experience_metrics = stage.experience(state, batch, experience_key)
            # A rollout may take minutes, and so may the update: SIGTERM is not let wait for both.
            if is_preempted(2 * step):
                if step == 0:
                    raise preemption.Preempted(step)
                save(step, state, position, is_stopping=True)
            with logs.goodput.spent_on("save"):
                checkpointer.release()
            state, update_metrics = stage.update(state, batch, update_key)
            del batch
            pending.flush()
            sent = inputs.send(step, wishes_save=clock.wishes_save())
            is_late = pending.is_save_due
            times = {"begun": begun, "data_seconds": data_seconds}
            pending.put(step + 1, experience_metrics, update_metrics, sent, **times)
            verdict = _evaluate(stage, state, step + 1, limits, logs, pending)
            if verdict.is_best:
                checkpointer.keep(step + 1)
            is_stopping = is_preempted(2 * step + 1)
            is_last = step + 1 == limits.num_steps or verdict.is_over
            is_due = checkpointer.is_due(step + 1) or is_late or verdict.is_best
            if is_stopping or is_last or is_due:
                save(step + 1, state, data.get_state(), is_stopping=is_stopping)
            if is_last:
                break
    with logs.goodput.spent_on("save"):
        checkpointer.wait()
    return state


class _Pending:
    """The metrics of the last step, on the devices until the next step is under way."""

    def __init__(
        self,
        stage: Stage,
        limits: Limits,
        logs: Logs,
        inputs: agreement.Inputs,
        watcher: concurrent.futures.Executor,
    ):
        self.is_save_due = False  # process 0 wished so in the last step that was read
        self._inputs = inputs
        self._sent: agreement.Sent | None = None
        self._stage = stage
        self._limits = limits
        self._logs = logs
        self._watcher = watcher
        self._step: int | None = None
        self._metrics: metrics.Metrics = {}
        self._values: dict[str, float] = {}
        self._begun = 0.0
        self._done: concurrent.futures.Future[float] | None = None
        self._last_done = 0.0

    def put(
        self,
        step: int,
        experience_metrics: metrics.Metrics,
        update_metrics: metrics.Metrics,
        sent: agreement.Sent,
        *,
        begun: float,
        data_seconds: float,
    ) -> None:
        """Store the metrics of a step; copies to the host are started and not waited for."""
        twice = sorted(set(experience_metrics) & set(update_metrics))
        if twice:
            raise ValueError(f"experience and update return the same metrics: {twice}")
        for leaf in jax.tree.leaves((experience_metrics, update_metrics)):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        self._step, self._begun = step, begun
        self._metrics = experience_metrics | update_metrics
        self._sent = sent
        self._values = {"time/data_seconds": data_seconds}
        # The loop itself looks later, after an evaluation or the next step's experience.
        self._done = self._watcher.submit(_time_when_ready, self._metrics)

    def add(self, values: Mapping[str, float]) -> None:
        """Add values to the row of the step."""
        self._values |= values

    def flush(self) -> None:
        """Read and write the row, if there is one; end the run where updates were skipped."""
        if self._step is None:
            return
        step, self._step = self._step, None
        self.is_save_due = self._inputs.read(self._sent)
        values = metrics.read(jax.device_get(self._metrics)) | self._values
        # A step is dispatched while the step before it still runs: its time starts after that.
        done = self._done.result()
        values["time/step_seconds"] = done - max(self._begun, self._last_done)
        self._last_done = done
        self._logs.writers.write(step, values)
        self._logs.progress.show(step, values)
        for name in self._stage.skip_counters:
            if values[name] >= self._limits.max_skipped_in_row:
                raise DivergedError(
                    f"{name} is {values[name]:.0f} after step {step}: loss or gradients were not "
                    f"finite, and no update was taken, for that many steps in a row"
                )


class _SaveClock:
    """The clock of saves by time: process 0 wishes one when it is due, all save a step later."""

    def __init__(self, every_minutes: float | None):
        self._every_minutes = every_minutes
        self.restart()

    def restart(self) -> None:
        """Start again, after a save."""
        self._last, self._has_wished = time.monotonic(), False

    def wishes_save(self) -> bool:
        """Return whether the time has come, the first time that it has."""
        if self._every_minutes is None or self._has_wished:
            return False
        self._has_wished = time.monotonic() - self._last >= 60 * self._every_minutes
        return self._has_wished


def _time_when_ready(values: metrics.Metrics) -> float:
    jax.block_until_ready(values)
    return time.monotonic()


def _next_batch(data: Data, step: int) -> Batch:
    try:
        return next(data)
    except StopIteration:
        raise errors.InputError(
            f"the data ended after {step} batches; the run needs more"
        ) from None


def _end(
    stage: Stage, first_step: int, limits: Limits, checkpointer: checkpoint.Checkpointer
) -> int:
    """Return the step to train to; the first one where the run has been stopped early before."""
    if stage.best is None:
        return limits.num_steps
    stage.best.begin(first_step)
    checkpointer.keep(stage.best.kept_step)
    return first_step if stage.best.is_over else limits.num_steps


def _evaluate(
    stage: Stage, state: State, step: int, limits: Limits, logs: Logs, pending: _Pending
) -> best_lib.Verdict:
    if stage.evaluate is None or limits.evaluate_every_steps is None:
        return best_lib.NOTHING
    if step % limits.evaluate_every_steps and step != limits.num_steps:
        return best_lib.NOTHING
    with logs.goodput.spent_on("evaluate"):
        values = stage.evaluate(state, step)
    pending.add(values)
    if stage.best is None:
        return best_lib.NOTHING
    verdict, more = stage.best.add(step, values)
    pending.add(more)
    return verdict
