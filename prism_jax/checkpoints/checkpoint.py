"""Checkpoints: the whole state, written in the background and verified when it is read.

A run's folder holds `checkpoints/N/` for the state after N steps, with the items `params` (or
`policy.params`, ...), `opt_state`, `position` (step, seed, data position), `meta` (identity of
the run, shape and checksum of each leaf) and `digests` (of `position` and `meta`); and
`finished.json` when the run has ended. A converted folder has the same form with `params`, `meta`
and `digests` alone. A step is visible only when it is complete. Only this file and `files.py` use
Orbax.
"""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from prism_jax import errors, small_files, tree_paths
from prism_jax.checkpoints import checksum, lock
from prism_jax.checkpoints import files as checkpoint_files
from prism_jax.checkpoints import meta as checkpoint_meta

Tree = Any
Json = Any

_FINISHED = "finished.json"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """The state that a run resumes from."""

    state: Tree
    step: int
    data_position: Json


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which never asks whether the job is preempted.

    `running.preemption` asks, more often than once a step; processes that ask at different places
    would not agree.
    """

    def reached_preemption(self, step: int) -> bool:
        """Return False."""
        del step
        return False


class Checkpointer:
    """The saved states of one run in its folder; use as a context manager."""

    def __init__(
        self,
        workdir: str,
        *,
        identity: checkpoint_meta.RunIdentity,
        seed: int,
        save_every_steps: int,
        num_kept: int,
        allow_mismatch: bool,
    ):
        """Open the folder, or make it, and remove the leftovers of killed saves.

        Args:
          workdir: local path or gs:// address of the run.
          identity: of this run; `restore` refuses the folder of another run.
          seed: the root seed, stored and compared.
          save_every_steps: steps between regular saves.
          num_kept: complete checkpoints to keep, the newest ones.
          allow_mismatch: log, instead of refusing, a folder of another run.
        """
        for name, value in (("save_every_steps", save_every_steps), ("num_kept", num_kept)):
            if value < 1:
                raise errors.InputError(f"checkpoint.{name} must be >= 1, got {value}")
        self._workdir = epath.Path(workdir)
        self._identity = identity
        self._seed = seed
        self._allow_mismatch = allow_mismatch
        self._is_writing = False  # a save has started whose result is not known yet
        self._is_reading = False  # it reads arrays of the state that are in the host's memory
        self._last_save = (0, 0)  # step and bytes, for the message if it fails later
        self._kept = checkpoint_files.Kept()
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=policies.FixedIntervalPolicy(save_every_steps),
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(num_kept), self._kept]
            ),
            cleanup_tmp_directories=True,
        )
        self._root = self._workdir / checkpoint_files.FOLDER
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._manager = _Manager(self._root, options=options)
        # Orbax reads its metadata in each step, and raises many kinds of errors for damage there.
        except Exception as error:
            raise errors.InputError(f"cannot make or open {self._root}: {error}") from error

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def keep(self, step: int | None) -> None:
        """Keep the state of this step from now on, whatever its age, and no other besides."""
        self._kept.step = step

    def steps(self) -> list[int]:
        """Return the complete steps on disk, oldest first."""
        with checkpoint_files.listing(self._root):
            self._manager.reload()
            return sorted(self._manager.all_steps())

    def is_due(self, step: int) -> bool:
        """Return whether to save the state after `step` steps; every process asks at each step.

        Raises:
          CheckpointError: an earlier save failed.
        """
        self.check_for_errors()
        return self._manager.should_save(step)

    def save(self, step: int, state: Tree, *, data_position: Json) -> None:
        """Save the state after `step` steps, unless that step is already on disk.

        Copies the devices' arrays to the host and returns while the write is under way. Arrays in
        the host's memory are read where they are: call `release` before they change.

        Raises:
          CheckpointError: this or an earlier save failed, or the state is not finite.
          InputError: another job took the folder over, see `checkpoints.lock.check`.
        """
        self.check_for_errors()
        if step in self._manager.all_steps():
            return
        position = {"step": step, "seed": self._seed, "data": data_position}
        self.write_items(
            step,
            checkpoint_meta.split_items(state),
            texts={checkpoint_files.POSITION: position},
        )

    def write_items(
        self, step: int, items: Mapping[str, Mapping[str, jax.Array]], *, texts: Mapping[str, Json]
    ) -> None:
        """Start writing these arrays, their `meta` and further JSON items as one step."""
        lock.check()
        meta = self._describe(step, items)
        arrays = {
            item: ocp.args.StandardSave(checkpoint_meta.nest(leaves))
            for item, leaves in items.items()
        }
        texts = {**texts, checkpoint_files.META: meta}
        texts |= {checkpoint_files.DIGESTS: checkpoint_files.digests(texts)}
        jsons = {item: ocp.args.JsonSave(text) for item, text in texts.items()}
        leaves = [leaf for of in items.values() for leaf in of.values()]
        self._last_save = (step, sum(leaf.nbytes for leaf in leaves))
        with self._explained():
            self._manager.save(step, args=ocp.args.Composite(**arrays, **jsons), force=True)
        self._is_reading = any(leaf.sharding.memory_kind == checksum.HOST for leaf in leaves)
        self._is_writing = True

    def check_for_errors(self) -> None:
        """Raise `CheckpointError` if a save failed since the last call; cheap, for every step."""
        # Orbax's check_for_errors reports nothing here: its finalizing thread has taken the error,
        # and only waiting for that thread raises it.
        if self._is_writing and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Block until the last save is complete on disk.

        Raises:
          CheckpointError: it failed.
        """
        with self._explained():
            self._manager.wait_until_finished()
        self._is_writing = self._is_reading = False

    def release(self) -> None:
        """Wait, as `wait` does, for a save that reads the host's memory, which it does not copy."""
        if self._is_reading:
            self.wait()

    def restore(self, abstract_state: Tree, *, step: int | None) -> Restored | None:
        """Return the newest complete state (or that of `step`), or None in a new folder.

        Args:
          abstract_state: shapes, dtypes and shardings of the state, on any mesh.
          step: None for the newest; an older one moves the newer ones to `set_aside/`.

        Raises:
          InputError: the folder is of another run or another state, or has no such step.
          CheckpointError: the data read differ from the data saved.
        """
        steps = self.steps()
        if step is None and not steps:
            return None
        step = checkpoint_files.choose(steps, step, self._workdir)
        meta, position = checkpoint_files.read_meta_and_position(self._manager, self._workdir, step)
        self._check_identity(step, meta, position)
        items = checkpoint_meta.split_items(abstract_state)
        checkpoint_files.refuse_differences(
            self._workdir,
            step,
            checkpoint_meta.shape_differences(
                _by_item(meta["leaves"]), _by_item(items), with_dtype=True
            ),
        )
        restored = {
            item: checkpoint_files.restore_leaves(self._manager, step, item, meta, leaves)
            for item, leaves in items.items()
        }
        for item, leaves in restored.items():
            checkpoint_files.verify(self._workdir, step, steps, item, meta, leaves)
        for newer in [s for s in steps if s > step]:
            self._set_aside(newer)
        return Restored(
            state=checkpoint_meta.join_items(abstract_state, restored),
            step=step,
            data_position=position["data"],
        )

    def finish(self, summary: Mapping[str, Json]) -> None:
        """Wait for the last save and mark the run as finished, with a summary for later stages."""
        self.wait()
        lock.check()
        if jax.process_index() == 0:
            text = {
                "stage": self._identity.stage,
                "config_hash": self._identity.config_hash(),
                "step": self.steps()[-1],
                "summary": dict(summary),
            }
            small_files.write(self._workdir / _FINISHED, text)

    def close(self) -> None:
        """Finish writing and stop the background threads."""
        with self._explained():
            self._manager.close()

    def _describe(self, step: int, items: Mapping[str, Mapping[str, jax.Array]]) -> Json:
        sums = {item: checksum.checksums(leaves) for item, leaves in items.items()}
        bad = [
            f"{item}/{name}" for item, of in sums.items() for name in of if not of[name].is_finite
        ]
        if bad:
            raise checkpoint_files.CheckpointError(
                f"the state after step {step} is not finite and was not saved; the complete steps "
                f"in {self._root} are {self.steps()}. Not finite:\n" + checkpoint_meta.lines(bad)
            )
        return checkpoint_meta.describe(self._identity, items, sums)

    def _check_identity(self, step: int, meta: Json, position: Json) -> None:
        differences = self._identity.differences(meta)
        if position["seed"] != self._seed:
            differences.append(f"seed: {position['seed']} in the checkpoint, {self._seed} here")
        if not differences:
            return
        where = f"{self._root / str(step)} is of another run"
        if not self._allow_mismatch:
            raise errors.InputError(
                f"{where}; use another workdir, or resume.allow_mismatch=True to go on:\n"
                + checkpoint_meta.lines(differences)
            )
        _log.warning("%s, continued all the same:\n%s", where, checkpoint_meta.lines(differences))

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self._workdir / "set_aside" / str(step)
            if target.exists():
                target.rmtree()
            target.parent.mkdir(parents=True, exist_ok=True)
            (self._root / str(step)).rename(target)
            _log.warning("moved the checkpoint of step %d to %s", step, target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set_aside_{step}")
        self._manager.reload()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn an error of a save into one message with path and sizes; remove its leftovers."""
        try:
            yield
        except Exception as error:
            step, size = self._last_save
            free = ""
            if checkpoint_files.is_local(self._root):
                free = f" ({shutil.disk_usage(self._root).free:,} bytes free)"
            if jax.process_index() == 0:
                checkpoint_files.remove_leftovers(self._root)
            raise checkpoint_files.CheckpointError(
                f"writing step {step} of {size:,} bytes to {self._root}{free} failed; complete "
                f"steps there: {self.steps()}. {error}"
            ) from error


def finished(workdir: str) -> Json | None:
    """Return the record of `Checkpointer.finish`, None when the run in `workdir` has not ended.

    Raises:
      InputError: the file is damaged.
    """
    return small_files.read(
        epath.Path(workdir) / _FINISHED,
        {"stage": str, "config_hash": str, "step": int, "summary": dict},
        remedy="delete it and start the run again, which then ends once more",
    )


def read_meta(workdir: str, *, step: int | None) -> Json:
    """Return the `meta` of the newest complete step (or of `step`): stage, configs, leaves."""
    folder = epath.Path(workdir)
    with checkpoint_files.opened(folder) as manager:
        step = checkpoint_files.choose(checkpoint_files.steps(manager), step, folder)
        return checkpoint_files.read_meta(manager, folder, step)


def load_params(
    workdir: str, abstract_params: Tree, *, item: str, step: int | None
) -> tuple[Tree, Json]:
    """Return the parameters of another run or of an exported folder, and its `meta`.

    The folder is read anew, so that a failed save of this process is never picked. Arrays are
    compared with their checksums in the dtype they were saved in, and then cast.

    Args:
      workdir: folder of a run or of `save_params`.
      abstract_params: shapes, dtypes and shardings of the result, on any mesh.
      item: "params", or "policy.params" where a run holds several states.
      step: None for the newest complete one.

    Raises:
      InputError: there is no checkpoint, no such item, or the parameters differ in name or shape.
      CheckpointError: the arrays read differ from those saved.
    """
    folder = epath.Path(workdir)
    with checkpoint_files.opened(folder) as manager:
        steps = checkpoint_files.steps(manager)
        step = checkpoint_files.choose(steps, step, folder)
        meta = checkpoint_files.read_meta(manager, folder, step)
        if item not in meta["leaves"]:
            raise errors.InputError(
                f"{folder} holds {sorted(meta['leaves'])} at step {step}, not {item!r}"
            )
        wanted = tree_paths.named_leaves(abstract_params)
        differences = checkpoint_meta.shape_differences(
            meta["leaves"][item], wanted, with_dtype=False
        )
        checkpoint_files.refuse_differences(folder, step, differences)
        leaves = checkpoint_files.restore_leaves(manager, step, item, meta, wanted)
        checkpoint_files.verify(folder, step, steps, item, meta, leaves)
    _log.info("read %s of step %d (%s) from %s", item, step, meta["stage"], folder)
    return tree_paths.with_named_leaves(abstract_params, _cast(leaves, wanted)), meta


def save_params(
    workdir: str, params: Tree, *, identity: checkpoint_meta.RunIdentity, step: int
) -> None:
    """Write parameters alone to a new folder for `load_params`; block until they are on disk.

    Raises:
      InputError: the folder holds checkpoints already.
      CheckpointError: writing failed.
    """
    with Checkpointer(
        workdir, identity=identity, seed=0, save_every_steps=1, num_kept=1, allow_mismatch=False
    ) as checkpointer:
        if checkpointer.steps():
            raise errors.InputError(f"{workdir} holds checkpoints already; name a new folder")
        items = {checkpoint_meta.PARAMS_ITEM: tree_paths.named_leaves(params)}
        checkpointer.write_items(step, items, texts={})
        checkpointer.finish({})


def _by_item(items: Mapping[str, Mapping[str, Json]]) -> dict[str, Json]:
    return {f"{item}: {name}": x for item, leaves in items.items() for name, x in leaves.items()}


def _cast(
    leaves: Mapping[str, jax.Array], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    changes = {
        f"{leaf.dtype.name} to {wanted[name].dtype.name}"
        for name, leaf in leaves.items()
        if leaf.dtype != wanted[name].dtype
    }
    if changes:
        _log.info("cast parameters from %s", ", ".join(sorted(changes)))
    return {name: leaf.astype(wanted[name].dtype) for name, leaf in leaves.items()}
