"""A training run, wired once for all stages: configuration, devices, folder, identity, loop.

def main(argv):
    with run_lib.opened(argv, "sft", Config) as run:
        files = setup_models.keep_files(run.options.model, run.folder)
        model = setup_models.open_model(run.options.model, run.devices, files=files, …)
        identity = run.identity(model)
        if run.is_finished(identity):
            return
        …
        run.train(identity, loop.Stage(…), data, start, limits=…, watched=…)
"""

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import jax
import ml_collections
from etils import epath

from prism_jax import configuration, errors, progress, version
from prism_jax.checkpoints import checkpoint, lock, mirror, model_files
from prism_jax.checkpoints import files as checkpoint_files
from prism_jax.checkpoints import meta as checkpoint_meta
from prism_jax.running import goodput, loop, metric_writers, preemption
from prism_jax.setup import agreement, distributed
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models

Tree = Any
Options = TypeVar("Options", bound=configuration.TrainingRun)
_BEAT_SECONDS = 15.0
_FINISHED = "finished.json"  # written by `Checkpointer.finish`

# The purpose of a folder: a training run, answers of `evaluate` or `pairs`, the steps of `curate`.
Kind = Literal["training", "answers", "curate"]

# The name of each kind, and the files that mark its folders from early on, and no others.
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
    """The random keys of a run; the seed decides both."""

    init: jax.Array
    run: jax.Array


def _keys(seed: int) -> Keys:
    init, run = jax.random.split(jax.random.key(seed))
    return Keys(init=init, run=run)


@contextlib.contextmanager
def hold(
    workdir: str, *, kind: Kind = "training", is_distributed: bool | None = None
) -> Iterator[pathlib.Path]:
    """Hold the run's folder for this job, made if it does not exist, and yield its path.

    Every process calls this, and process 0 holds the folder for all. The path of a folder on gs://
    is that of a local one, see `checkpoints.mirror`.

    Args:
      is_distributed: whether the processes of a job are to be joined first, see `mesh`.

    Raises:
      InputError: another living job holds it, or it is of another kind; on all processes.
    """
    if "://" in workdir and not workdir.startswith("gs://"):
        raise errors.InputError(f"--workdir={workdir}: must be a folder or a gs:// address")
    distributed.join(is_distributed)
    with contextlib.ExitStack() as stack:

        def take() -> None:
            stack.enter_context(lock.hold(workdir, beat_seconds=_BEAT_SECONDS))
            _refuse_others(epath.Path(workdir), kind)

        agreement.on_first("hold", take)
        is_first = jax.process_index() == 0
        yield stack.enter_context(mirror.opened(workdir, has_files=is_first))


def _refuse_others(folder: epath.Path, kind: Kind) -> None:
    """Refuse a folder that holds anything of another kind, whatever else it holds."""
    for other, (name, marks) in _KINDS.items():
        present = [mark for mark in marks if (folder / mark).exists()]
        if other != kind and present:
            raise errors.InputError(
                f"{folder} holds {name} ({', '.join(present)}); a folder is for one kind of job, "
                f"and this is {_KINDS[kind][0]}: use another workdir"
            )


class OnDevices:
    """Batches of host data, moved to the devices; the resume position is delegated to `data`."""

    def __init__(self, data: loop.Data, devices: devices_lib.Devices, *, num_rows: int):
        """Take batches of `num_rows` rows, over all processes; see `batches.to_devices`."""
        self._data, self._devices, self._num_rows = data, devices, num_rows

    def __next__(self) -> Tree:
        return self._devices.put(next(self._data), num_rows=self._num_rows)

    def get_state(self) -> Any:
        """Return the position after the last batch."""
        return self._data.get_state()

    def set_state(self, state: Any) -> None:
        """Continue after that position."""
        self._data.set_state(state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Generic[Options]):
    """A training run whose folder this job holds."""

    stage: str
    config: ml_collections.ConfigDict  # from which `options` was read
    options: Options
    devices: devices_lib.Devices
    keys: Keys
    folder: pathlib.Path
    begun: float  # `time.monotonic()` at the start of the program
    inputs: agreement.Inputs
    tables: metric_writers.Tables | None  # None: no writer shows tables

    def identity(
        self, *models: setup_models.Model, digests: Mapping[str, str] | None = None
    ) -> checkpoint_meta.RunIdentity:
        """Return the names of the run in its checkpoints; of models the policy comes first.

        Args:
          digests: of files of the user's that are executed, by the field that names them.
        """
        values = dict(models[0].values)
        if len(models) > 1:
            values = {"policy": values, "discriminator": dict(models[1].values)}
        return checkpoint_meta.RunIdentity(
            project_version=version.VERSION,
            stage=self.stage,
            config=configuration.plain(self.config) | ({"files": dict(digests)} if digests else {}),
            model_config=values,
            may_differ=configuration.free_fields(type(self.options)),
        )

    @property
    def address(self) -> str:
        """Return where the folder is for good: a path, or an address on gs://."""
        return mirror.address(self.folder)

    def is_finished(self, identity: checkpoint_meta.RunIdentity) -> bool:
        """Return whether this very run has ended, and print it; nothing needs to be opened then."""
        marker = agreement.on_first("finished", lambda: checkpoint.finished(self.address))
        if marker is None or marker["config_hash"] != identity.config_hash():
            return False
        # Resuming at a step runs the steps after it again.
        if self.options.resume.step is not None:
            return False
        progress.say(f"{self.address}: finished after {marker['step']} steps already")
        return True

    def train(
        self,
        identity: checkpoint_meta.RunIdentity,
        stage: loop.Stage,
        data: loop.Data,
        start: setup_models.Start,
        *,
        limits: loop.Limits,
        watched: Sequence[str],
    ) -> Tree:
        """Begin or continue the run, train to its end, mark it as finished; return the last state.

        On SIGTERM the state is saved and the program leaves with exit code 143.

        Args:
          data: gives batches on the devices, see `OnDevices`.
          watched: the few metrics in the progress line.
        """
        options, num_steps = self.options, limits.num_steps
        with checkpoint.Checkpointer(
            self.address,
            save_every_steps=options.checkpoint.save_every_steps,
            identity=identity,
            seed=options.seed,
            num_kept=options.checkpoint.num_kept,
            allow_mismatch=options.resume.allow_mismatch,
        ) as checkpointer:
            state, first_step = loop.restore_or_make(
                checkpointer,
                data,
                abstract_state=start.abstract,
                make_state=start.make,
                step=options.resume.step,
            )
            if first_step < num_steps and jax.process_index() == 0:
                (epath.Path(self.address) / _FINISHED).unlink(missing_ok=True)
            if first_step:
                progress.say(f"continuing {self.address} after step {first_step}")
            with _logs(self, first_step, num_steps=num_steps, watched=watched) as logs:
                try:
                    state = loop.run(
                        stage,
                        state,
                        data,
                        key=self.keys.run,
                        first_step=first_step,
                        limits=limits,
                        checkpointer=checkpointer,
                        save_every_minutes=options.checkpoint.save_every_minutes,
                        logs=logs,
                        inputs=self.inputs,
                    )
                except preemption.Preempted as stop:
                    logs.progress.close()
                    progress.say(str(stop))
                    raise
            checkpointer.finish(_summary(stage, num_steps))
        return state


def _summary(stage: loop.Stage, num_steps: int) -> dict[str, Any]:
    """Return the record of a finished run."""
    return {"steps": num_steps} | ({} if stage.best is None else stage.best.summary())


@contextlib.contextmanager
def opened(argv: Sequence[str], stage: str, kind: type[Options]) -> Iterator[Run[Options]]:
    """Read a stage's configuration, open its devices and hold its folder.

    Raises:
      InputError: the configuration is wrong, does not fit the devices, or the folder is not free.
    """
    begun = time.monotonic()
    config, workdir = configuration.read(argv, command=stage)
    options = configuration.parse(kind, config)
    devices = devices_lib.open_devices(options.mesh, options.model)
    problems = options.problems_on(devices.layout())
    if problems:
        raise errors.InputError("; ".join(f"config.{problem}" for problem in problems))
    with (
        hold(workdir, is_distributed=options.mesh.is_distributed) as folder,
        jax.set_mesh(devices.mesh),
    ):
        yield Run(
            stage=stage,
            config=config,
            options=options,
            devices=devices,
            keys=_keys(options.seed),
            folder=folder,
            begun=begun,
            inputs=agreement.Inputs(),
            tables=metric_writers.Tables() if options.log.wandb_project else None,
        )


@contextlib.contextmanager
def _logs(
    run: Run, first_step: int, *, num_steps: int, watched: Sequence[str]
) -> Iterator[loop.Logs]:
    """Open the files and the progress line of the process that writes; close them at the end."""
    is_writer = jax.process_index() == 0
    opened: list[metric_writers.Writer] = []
    lost_steps = 0
    if is_writer:
        lines = metric_writers.JsonLines(run.folder / "metrics.jsonl", last_step=first_step)
        board = metric_writers.TensorBoard(run.folder / "tensorboard", last_step=first_step)
        opened, lost_steps = [lines, board], lines.num_dropped
        if run.options.log.wandb_project:
            opened.append(
                metric_writers.WeightsAndBiases(
                    run.folder,
                    project=run.options.log.wandb_project,
                    name=run.address.rstrip("/").rpartition("/")[2],
                    tables=run.tables,
                )
            )
    writers = metric_writers.Writers(opened)
    account = goodput.Goodput(
        run.folder / "goodput.jsonl" if is_writer else None,
        begun=run.begun,
        lost_steps=lost_steps,
    )
    shown = progress.Progress(
        sys.stderr if is_writer else None,
        title=run.stage,
        first_step=first_step,
        num_steps=num_steps,
        watched=tuple(watched),
        line_every_steps=run.options.log.line_every_steps,
    )
    try:
        yield loop.Logs(writers=writers, progress=shown, goodput=account)
    finally:
        writers.close()
        account.close()
        shown.close()
