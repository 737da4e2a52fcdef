"""The files of a checkpoint: listing complete steps, reading and verifying them."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from prism_jax import errors, small_files, tree_paths
from prism_jax.checkpoints import checksum
from prism_jax.checkpoints import meta as checkpoint_meta

Json = Any

FOLDER = "checkpoints"
META = "meta"
POSITION = "position"
DIGESTS = "digests"  # of META and POSITION

_LEAF = {"shape": [int], "dtype": str, "checksum": [int]}
_SCHEMAS = {
    META: {
        "format": int,
        "project_version": str,
        "stage": str,
        "config": dict,
        "config_hash": str,
        "model_config": dict,
        "leaves": {str: {str: _LEAF}},
    },
    POSITION: {"step": int, "seed": int, "data": None},
}
_log = logging.getLogger(__name__)


class CheckpointError(errors.RunError):
    """A checkpoint could not be written, or must not be read; nothing older was lost."""


class DamagedError(CheckpointError):
    """A checkpoint on disk differs from the one that was written, so it is not read."""

    exit_code = 2


class Kept(ocp.checkpoint_managers.PreservationPolicy):
    """Orbax's rule that keeps one step beside the newest ones."""

    def __init__(self) -> None:
        self.step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return True for the step."""
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]


@contextlib.contextmanager
def opened(folder: epath.Path) -> Iterator[ocp.CheckpointManager]:
    root = folder / FOLDER
    if not root.exists():
        raise errors.InputError(f"there are no checkpoints in {folder}: {root} does not exist")
    with listing(root):
        manager = ocp.CheckpointManager(root, options=ocp.CheckpointManagerOptions(create=False))
    try:
        yield manager
    finally:
        manager.close()


@contextlib.contextmanager
def listing(root: epath.Path) -> Iterator[None]:
    """Turn Orbax's errors in listing the steps, whose metadata it reads, into one message."""
    try:
        yield
    except Exception as error:
        raise DamagedError(f"the steps in {root} cannot be listed: {error!r}") from error


def steps(manager: ocp.CheckpointManager) -> list[int]:
    """Return the complete steps on disk, oldest first."""
    with listing(manager.directory):
        return sorted(manager.all_steps())


def choose(steps: Sequence[int], step: int | None, folder: epath.Path) -> int:
    if not steps:
        raise errors.InputError(f"there is no complete checkpoint in {folder / FOLDER}")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise errors.InputError(
            f"there is no complete checkpoint of step {step} in {folder / FOLDER}; there are "
            f"{list(steps)}"
        )
    return step


def digests(texts: Mapping[str, Json]) -> dict[str, str]:
    """Return the SHA-256 of each JSON value, whatever order its keys are in."""
    # Through JSON, so that tuples and numeric keys have the form in which they are read back.
    plain = {item: json.loads(json.dumps(text)) for item, text in texts.items()}
    return {
        item: hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
        for item, text in plain.items()
    }


def read_texts(
    manager: ocp.CheckpointManager, folder: epath.Path, step: int, *items: str
) -> dict[str, Json]:
    """Return JSON items of a step, compared with their digests, and with their schemas.

    A step of format 1 was written before there were digests; it is read with a warning.
    """
    where = folder / FOLDER / str(step)
    wanted = (*items, DIGESTS) if (where / DIGESTS).exists() else items
    try:
        read = manager.restore(
            step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore() for item in wanted})
        )
        texts = {item: read[item] for item in wanted}
    # Orbax raises many kinds of errors for a missing or damaged file.
    except Exception as error:
        raise DamagedError(
            f"{where} is not a whole checkpoint, its {' or '.join(wanted)} cannot be read: {error}"
        ) from error
    stored = texts.pop(DIGESTS, None)
    computed = digests(texts)
    for item in items:
        digest = stored.get(item) if isinstance(stored, Mapping) else None
        if stored is not None and digest != computed[item]:
            raise DamagedError(
                f"{where / item} is damaged: its digest is not the one that it was written with; "
                "go back to an older step with resume.step, if there is one"
            )
        problem = small_files.problem_of(texts[item], _SCHEMAS[item])
        if problem is not None:
            raise DamagedError(f"{where / item} is damaged: {problem}")
    if stored is None:
        if META in items and texts[META]["format"] != checkpoint_meta.WITHOUT_DIGESTS:
            raise DamagedError(f"{where} is not a whole checkpoint, its {DIGESTS} are missing")
        _log.warning(
            "%s was written before data positions had digests: it is read unchecked", where
        )
    return texts


def read_meta(manager: ocp.CheckpointManager, folder: epath.Path, step: int) -> Json:
    """Return the metadata of a step."""
    return _known(folder, step, read_texts(manager, folder, step, META)[META])


def read_meta_and_position(
    manager: ocp.CheckpointManager, folder: epath.Path, step: int
) -> tuple[Json, Json]:
    """Return the metadata of a step and its position in the data."""
    texts = read_texts(manager, folder, step, META, POSITION)
    meta, position = _known(folder, step, texts[META]), texts[POSITION]
    if position["step"] != step:
        raise DamagedError(
            f"{folder / FOLDER / str(step) / POSITION} is damaged: it is of step {position['step']}"
        )
    return meta, position


def _known(folder: epath.Path, step: int, meta: Json) -> Json:
    if meta["format"] not in (checkpoint_meta.WITHOUT_DIGESTS, checkpoint_meta.FORMAT):
        raise errors.InputError(
            f"{folder / FOLDER / str(step)} has format {meta['format']}, this version reads "
            f"{checkpoint_meta.FORMAT}"
        )
    return meta


def refuse_differences(folder: epath.Path, step: int, differences: Sequence[str]) -> None:
    if differences:
        raise errors.InputError(
            f"the checkpoint of step {step} in {folder} does not match the model:\n"
            + checkpoint_meta.lines(differences)
        )


def restore_leaves(
    manager: ocp.CheckpointManager,
    step: int,
    item: str,
    meta: Json,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Read one item into the wanted shardings, in the dtypes it was saved in."""

    def target(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding
        if sharding is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        dtype = jnp.dtype(meta["leaves"][item][name]["dtype"])
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    targets = {name: target(name, leaf) for name, leaf in wanted.items()}
    try:
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                **{item: ocp.args.StandardRestore(checkpoint_meta.nest(targets))}
            ),
        )
    except Exception as error:
        raise DamagedError(
            f"cannot read {item} of step {step} in {manager.directory}: {error}"
        ) from error
    return tree_paths.named_leaves(restored[item])


def verify(
    folder: epath.Path,
    step: int,
    steps: Sequence[int],
    item: str,
    meta: Json,
    leaves: Mapping[str, jax.Array],
) -> None:
    older = [s for s in steps if s < step]
    offer = f"start from step {older[-1]} instead" if older else "there is no older step"
    sums = checksum.checksums(leaves)
    corrupt = checkpoint_meta.corrupt_leaves(meta["leaves"][item], sums)
    not_finite = [name for name, entry in sums.items() if not entry.is_finite]
    for names, rule in (
        (corrupt, "is corrupt: the checksums of these leaves are not those they were saved with"),
        (not_finite, "holds NaN or infinity, in these leaves"),
    ):
        if names:
            raise DamagedError(
                f"{item} of step {step} in {folder} {rule}; {offer}:\n"
                + checkpoint_meta.lines(names)
            )


def is_local(path: epath.Path) -> bool:
    return "://" not in str(path)


def remove_leftovers(root: epath.Path) -> None:
    """Remove the leftovers of a failed save, so that they do not keep the disk full."""
    for path in root.glob("*.orbax-checkpoint-tmp*"):
        path.rmtree(missing_ok=True)
