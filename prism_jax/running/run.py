"""The second half of every training stage: its folder, its identity, and one start of the loop."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import ml_collections

from prism_jax import batches, configuration, errors, progress, version
from prism_jax.checkpoints import checkpoint, lock, model_files
from prism_jax.checkpoints import files as checkpoint_files
from prism_jax.checkpoints import meta as checkpoint_meta
from prism_jax.running import goodput, loop, metric_writers, preemption
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models

Tree = Any
_BEAT_SECONDS = 15.0
_FINISHED = "finished.json"  # what `Checkpointer.finish` writes

# What a folder is for: a training run, the answers of `evaluate` or `pairs`, both steps of `curate`
Kind = Literal["training", "answers", "curate"]

# What each kind is called, and what its folders have from early on that those of no other have.
_KINDS: dict[Kind, tuple[str, tuple[str, ...]]] = {
    "training": (
        "a training run",
        (checkpoint_files.FOLDER, f"{model_files.FOLDER}/config.json", _FINISHED),
    ),
    "answers": ("an evaluation or pairs", ("run.json",)),
    "curate": (
        "the steps of curate",
        ("difficulty/run.json", "teacher/cache", "teacher/report.json"),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keys:
    """Hold the random keys of a run; the seed decides both."""

    init: jax.Array
    run: jax.Array


def keys(seed: int) -> Keys:
    """Return the keys of a seed."""
    if seed < 0:
        raise errors.InputError(f"config.seed must be >= 0, got {seed}")
    init, run_ = jax.random.split(jax.random.key(seed))
    return Keys(init=init, run=run_)


@contextlib.contextmanager
def hold(workdir: str, *, kind: Kind = "training") -> Iterator[pathlib.Path]:
    """Hold the run's folder for this job, made if it does not exist, and yield its path.

    Raises:
      InputError: another living job holds it, it is of another kind, or it is not a local folder.
    """
    if "://" in workdir:
        raise errors.InputError(f"--workdir={workdir}: must be a local (or mounted) folder")
    path = pathlib.Path(workdir)
    if jax.process_index() == 0:
        with lock.hold(workdir, beat_seconds=_BEAT_SECONDS):
            _refuse_others(path, kind)
            yield path
    else:
        yield path


def _refuse_others(folder: pathlib.Path, kind: Kind) -> None:
    """Refuse a folder that holds anything of another kind, whatever else it holds."""
    for other, (what, marks) in _KINDS.items():
        found = [mark for mark in marks if (folder / mark).exists()]
        if other != kind and found:
            raise errors.InputError(
                f"{folder} holds {what} ({', '.join(found)}); a folder is for one kind of job, "
                f"and this is {_KINDS[kind][0]}: use another workdir"
            )


def identity(
    stage: str,
    config: ml_collections.ConfigDict,
    models: Sequence[setup_models.Model],
    *,
    may_differ: Sequence[str],
) -> checkpoint_meta.RunIdentity:
    """Return what names the run in its checkpoints.

    Args:
      models: the policy first, then a discriminator, if there is one.
      may_differ: keys that may change in a continuation, besides `configuration.MAY_DIFFER`.
    """
    values = dict(models[0].values)
    if len(models) > 1:
        values = {"policy": values, "discriminator": dict(models[1].values)}
    return checkpoint_meta.RunIdentity(
        project_version=version.VERSION,
        stage=stage,
        config=configuration.plain(config),
        model_config=values,
        may_differ=(*configuration.MAY_DIFFER, *may_differ),
    )


def is_finished(workdir: pathlib.Path, identity: checkpoint_meta.RunIdentity) -> bool:
    """Tell, also the user, whether this very run has ended; nothing needs to be opened then."""
    marker = checkpoint.finished(str(workdir))
    if marker is None or marker["config_hash"] != identity.config_hash():
        return False
    if identity.config["resume"]["step"] is not None:  # it is to be run again from there
        return False
    progress.say(f"{workdir}: finished after {marker['step']} steps already")
    return True


class OnDevices:
    """Put the batches of host data on the devices; the position is the data's."""

    def __init__(self, data: loop.Data, devices: devices_lib.Devices):
        self._data = data
        self._devices = devices

    def __next__(self) -> Tree:
        return batches.to_devices(next(self._data), self._devices.mesh, self._devices.rules)

    def get_state(self) -> Any:
        """Return the position after the last batch."""
        return self._data.get_state()

    def set_state(self, state: Any) -> None:
        """Go on after that position."""
        self._data.set_state(state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Say what is run, and how it is saved and shown."""

    identity: checkpoint_meta.RunIdentity
    workdir: pathlib.Path
    seed: int
    key: jax.Array
    begun: float  # `time.monotonic()` at the start of the program
    num_steps: int
    evaluate_every_steps: int | None
    max_skipped_in_row: int
    watched: tuple[str, ...]  # the few metrics in the progress line
    checkpoint: configuration.Checkpoint
    resume: configuration.Resume
    log: configuration.Log


def run(
    run: Run,
    stage: loop.Stage,
    data: loop.Data,
    *,
    abstract_state: Tree,
    make_state: Callable[[], Tree],
    summary: Mapping[str, Any],
) -> Tree:
    """Begin or continue a run, train to its end, mark it as finished; return the last state.

    On SIGTERM the state is saved and the program leaves with exit code 143.

    Args:
      data: gives batches on the devices, see `OnDevices`.
      summary: what `finished.json` tells later stages besides the number of steps.
    """
    workdir = run.workdir
    with checkpoint.Checkpointer(
        str(workdir.absolute()),
        identity=run.identity,
        seed=run.seed,
        save_every_steps=run.checkpoint.save_every_steps,
        num_kept=run.checkpoint.num_kept,
        allow_mismatch=run.resume.allow_mismatch,
    ) as checkpointer:
        state, first_step = loop.restore_or_make(
            checkpointer,
            data,
            abstract_state=abstract_state,
            make_state=make_state,
            step=run.resume.step,
        )
        if first_step < run.num_steps and jax.process_index() == 0:
            (workdir / _FINISHED).unlink(missing_ok=True)
        if first_step:
            progress.say(f"continuing {workdir} after step {first_step}")
        with _logs(run, first_step) as logs:
            try:
                state = loop.run(
                    stage,
                    state,
                    data,
                    key=run.key,
                    first_step=first_step,
                    limits=loop.Limits(
                        num_steps=run.num_steps,
                        evaluate_every_steps=run.evaluate_every_steps,
                        max_skipped_in_row=run.max_skipped_in_row,
                    ),
                    checkpointer=checkpointer,
                    logs=logs,
                )
            except preemption.Preempted as stop:
                logs.progress.close()
                progress.say(str(stop))
                raise
        checkpointer.finish({"steps": run.num_steps} | dict(summary))
    return state


@contextlib.contextmanager
def _logs(run: Run, first_step: int) -> Iterator[loop.Logs]:
    """Open the files and the progress line of the process that writes; close them at the end."""
    is_writer = jax.process_index() == 0
    opened: list[metric_writers.Writer] = []
    lost_steps = 0
    if is_writer:
        lines = metric_writers.JsonLines(run.workdir / "metrics.jsonl", last_step=first_step)
        board = metric_writers.TensorBoard(run.workdir / "tensorboard", last_step=first_step)
        opened, lost_steps = [lines, board], lines.num_dropped
        if run.log.wandb_project:
            opened.append(
                metric_writers.WeightsAndBiases(
                    run.workdir, project=run.log.wandb_project, name=run.workdir.name
                )
            )
    writers = metric_writers.Writers(opened)
    account = goodput.Goodput(
        run.workdir / "goodput.jsonl" if is_writer else None,
        begun=run.begun,
        lost_steps=lost_steps,
    )
    shown = progress.Progress(
        sys.stderr if is_writer else None,
        title=run.identity.stage,
        first_step=first_step,
        num_steps=run.num_steps,
        watched=run.watched,
        line_every_steps=run.log.line_every_steps,
    )
    try:
        yield loop.Logs(writers=writers, progress=shown, goodput=account)
    finally:
        writers.close()
        account.close()
        shown.close()
