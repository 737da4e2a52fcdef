"""The batch of a training step as a frozen pytree, and the layout of its rows on the mesh.

The first axis of each array counts the microbatches, the second the rows: a step scans over the
first and shards the second. The one exception is in `models.inputs.TextInput`, whose positions have
three coordinates between the two, int32[M, 3, B, T].
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import inputs, sharding

# An array, or JAX's substitute for it in a rebuilt struct: a spec, None, a tracer.
Leaf = Any
Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTBatch:
    """Packed rows of demonstrations: M microbatches of B rows of T tokens, P patches."""

    text: inputs.TextInput  # tokens int32[M, B, T], …
    vision: inputs.VisionInput | None  # pixels uint8[M, B, P, C], …; None: no row has images
    is_assistant: Leaf  # bool[M, B, T]  the token is part of a response, its end token included


def split(batch: Tree, num_microbatches: int) -> Tree:
    """Split host arrays [rows, ...] into [M, rows / M, ...], M = num_microbatches.

    The positions of a text, [3, rows, T], become [M, 3, rows / M, T].

    Raises:
      ValueError: the rows of an array do not divide by M.
    """

    def parts(x: np.ndarray) -> np.ndarray:
        if x.shape[0] % num_microbatches:
            raise ValueError(
                f"{x.shape[0]} rows do not divide into num_microbatches={num_microbatches}"
            )
        return x.reshape(num_microbatches, x.shape[0] // num_microbatches, *x.shape[1:])

    def node_parts(node: Tree) -> Tree:
        if not isinstance(node, inputs.TextInput):
            return parts(node)
        rows_first = dataclasses.replace(node, positions=np.moveaxis(node.positions, 1, 0))
        split_rows = jax.tree.map(parts, rows_first)
        return dataclasses.replace(split_rows, positions=np.moveaxis(split_rows.positions, 2, 1))

    return jax.tree.map(node_parts, batch, is_leaf=lambda x: isinstance(x, inputs.TextInput))


def shardings(batch: Tree, mesh: Mesh, rules: sharding.Rules) -> Tree:
    """Return the sharding of each array of a batch: rows over the axes of "batch" or "images"."""

    def rows(axis: str, place: int) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*[None] * place, rules.mesh_axes(axis)))

    def places(node: Tree) -> Tree:
        if isinstance(node, inputs.TextInput):
            by_row = jax.tree.map(lambda _: rows("batch", 1), node)
            return dataclasses.replace(by_row, positions=rows("batch", 2))
        if isinstance(node, inputs.VisionInput):
            return jax.tree.map(lambda _: rows("images", 1), node)
        return rows("batch", 1)

    return jax.tree.map(
        places, batch, is_leaf=lambda x: isinstance(x, inputs.TextInput | inputs.VisionInput)
    )


def local_rows(num_rows: int, mesh: Mesh, rules: sharding.Rules) -> list[int]:
    """Return the rows of a batch (or of each microbatch) that this process makes.

    Raises:
      ValueError: the rows do not divide over the mesh.
    """
    place = NamedSharding(mesh, PartitionSpec(rules.mesh_axes("batch")))
    rows: set[int] = set()
    for (part,) in place.addressable_devices_indices_map((num_rows,)).values():
        rows |= set(range(*part.indices(num_rows)))
    return sorted(rows)


def to_devices(batch: Tree, mesh: Mesh, rules: sharding.Rules, *, num_rows: int) -> Tree:
    """Put this process's rows of a batch on its devices; the processes' rows make up one batch.

    Starts the copies and does not wait for them.

    Args:
      batch: host arrays of the rows of `local_rows`, in their order; arrays on the devices
        are whole.
      num_rows: of a microbatch, over all processes.

    Raises:
      ValueError: an array holds other rows than this process's, such as those of all processes.
    """
    rows = local_rows(num_rows, mesh, rules)
    places = shardings(batch, mesh, rules)

    def check(leaf: Leaf, place: NamedSharding) -> None:
        axis = len(place.spec) - 1
        wanted = num_rows if isinstance(leaf, jax.Array) else len(rows)
        if leaf.shape[axis] != wanted:
            raise ValueError(
                f"process {jax.process_index()} must give {wanted} of {num_rows} rows on axis "
                f"{axis}, got an array {leaf.shape}"
            )

    def put(leaf: Leaf, place: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array):
            return jax.device_put(leaf, place)
        return _from_local_rows(leaf, place, local=rows, num_rows=num_rows)

    jax.tree.map(check, batch, places)
    if jax.process_count() == 1:
        return jax.device_put(batch, places)
    return jax.tree.map(put, batch, places)


def _from_local_rows(
    leaf: np.ndarray, place: NamedSharding, *, local: list[int], num_rows: int
) -> jax.Array:
    """Return the global array of which this process has these rows."""
    axis = len(place.spec) - 1
    shape = (*leaf.shape[:axis], num_rows, *leaf.shape[axis + 1 :])

    def part(index: tuple[slice, ...]) -> np.ndarray:
        rows = range(*index[axis].indices(num_rows))
        first = local.index(rows[0])
        # The rows of a device are side by side among all rows, and so among this process's.
        return leaf[(slice(None),) * axis + (slice(first, first + len(rows)),)]

    return jax.make_array_from_callback(shape, place, part)


def to_host(tree: Tree) -> Tree:
    """Return the whole arrays on the host, those too of which other processes hold parts.

    Every process calls it with the same arrays.
    """

    def fetch(leaf: Leaf) -> np.ndarray:
        is_whole = not isinstance(leaf, jax.Array) or (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        )
        return leaf if is_whole else multihost_utils.process_allgather(leaf, tiled=True)

    # Several arrays are fetched at a time where they can be.
    return jax.device_get(jax.tree.map(fetch, tree))
