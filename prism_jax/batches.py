"""The batch of a training step as a frozen pytree, and the layout of its rows on the mesh.

The first axis of each array counts the microbatches, the second the rows: a step scans over the
first and shards the second. The one exception is in `models.inputs.TextInput`, whose positions have
three coordinates between the two, int32[M, 3, B, T].
"""

import dataclasses
from typing import Any

import jax
import numpy as np
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


def split_text(text: inputs.TextInput, num_microbatches: int) -> inputs.TextInput:
    """Split host rows [rows, T] into [M, rows / M, T], positions [3, rows, T] accordingly."""
    rows_first = dataclasses.replace(text, positions=np.moveaxis(text.positions, 1, 0))
    parts = jax.tree.map(
        lambda x: x.reshape(num_microbatches, x.shape[0] // num_microbatches, *x.shape[1:]),
        rows_first,
    )
    return dataclasses.replace(parts, positions=np.moveaxis(parts.positions, 2, 1))


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


def to_devices(batch: Tree, mesh: Mesh, rules: sharding.Rules) -> Tree:
    """Put this process's rows of a batch on its devices; the processes' rows make up one batch.

    Starts the copies and does not wait for them.
    """
    places = shardings(batch, mesh, rules)
    if jax.process_count() == 1:
        return jax.device_put(batch, places)
    return jax.tree.map(
        lambda leaf, place: jax.make_array_from_process_local_data(place, leaf), batch, places
    )
