"""The files of a checkpoint: finding complete steps, reading and checking them."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from prism_jax import errors, tree_paths
from prism_jax.checkpoints import checksum
from prism_jax.checkpoints import meta as checkpoint_meta

Json = Any

FOLDER = "checkpoints"
META = "meta"
POSITION = "position"


class CheckpointError(RuntimeError):
    """Report a checkpoint that could not be written or must not be read; nothing older was lost."""


def write_atomically(path: epath.Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(text)
    partial.replace(path)


@contextlib.contextmanager
def opened(folder: epath.Path) -> Iterator[ocp.CheckpointManager]:
    root = folder / FOLDER
    if not root.exists():
        raise errors.InputError(f"there are no checkpoints in {folder}: {root} does not exist")
    manager = ocp.CheckpointManager(root, options=ocp.CheckpointManagerOptions(create=False))
    try:
        yield manager
    finally:
        manager.close()


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


def read_json(manager: ocp.CheckpointManager, folder: epath.Path, step: int, item: str) -> Json:
    try:
        return manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[
            item
        ]
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{folder / FOLDER / str(step)} is not a whole checkpoint, its {item} cannot be "
            f"read: {error}"
        ) from error


def read_meta(manager: ocp.CheckpointManager, folder: epath.Path, step: int) -> Json:
    meta = read_json(manager, folder, step, META)
    if meta["format"] != checkpoint_meta.FORMAT:
        raise errors.InputError(
            f"{folder / FOLDER / str(step)} has format {meta['format']}, this version reads "
            f"{checkpoint_meta.FORMAT}"
        )
    return meta


def refuse_differences(folder: epath.Path, step: int, found: Sequence[str]) -> None:
    if found:
        raise errors.InputError(
            f"the checkpoint of step {step} in {folder} does not match the model:\n"
            + checkpoint_meta.lines(found)
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
        raise CheckpointError(
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
    bad = checkpoint_meta.corrupt_leaves(meta["leaves"][item], checksum.checksums(leaves))
    if bad:
        older = [s for s in steps if s < step]
        offer = f"start from step {older[-1]} instead" if older else "there is no older step"
        raise CheckpointError(
            f"{item} of step {step} in {folder} is corrupt: the checksums of these leaves are not "
            f"those they were saved with; {offer}:\n" + checkpoint_meta.lines(bad)
        )


def is_local(path: epath.Path) -> bool:
    return "://" not in str(path)


def remove_leftovers(root: epath.Path) -> None:
    """Remove what a failed save left, so that it does not keep the disk full."""
    for path in root.glob("*.orbax-checkpoint-tmp*"):
        path.rmtree(missing_ok=True)
