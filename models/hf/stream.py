"""Move single tensors between files and sharded, stacked parameters.

Kernels are transposed on the device, not on the host: a piece is uploaded with its axes in the
order of the file, sharded as they will finally be, so transposing moves no data between devices.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from models.hf import files as hf_files
from models.hf import names as hf_names
from models.hf import reader as hf_reader

# Pieces are uploaded in about this size, and a few of them may be in flight to the devices.
GROUP_BYTES = 32 << 20
_IN_FLIGHT_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One parameter: its location in a checkpoint and, to load it, on the devices."""

    path: str
    shape: tuple[int, ...]
    weight: hf_names.Weight
    sharding: Sharding | None  # None: not to be loaded
    dtype: np.dtype | None  # None: the stored type


class Loader:
    """A loader of groups of parameters; a few pieces may be in flight to the devices at a time."""

    def __init__(self, reader: hf_reader.Reader):
        self.reader = reader
        self._in_flight: collections.deque[list[jax.Array]] = collections.deque()

    def load(self, group: Sequence[Leaf]) -> dict[str, jax.Array]:
        """Return the parameters that are parts of the same tensors, by path."""
        cuts = _cuts(group, self.reader.tensors[group[0].weight.names[0]].num_bytes)
        result: dict[str, jax.Array] = {}
        for cut in cuts:
            pieces = _read_pieces(self.reader, group, cut)
            for leaf, piece in zip(group, pieces, strict=True):
                path, sharding = leaf.path, leaf.sharding
                dtype = piece.dtype if leaf.dtype is None else leaf.dtype
                lead = () if leaf.weight.num_layers is None else (0,)
                order = (*lead, *(axis + len(lead) for axis in leaf.weight.order))
                if len(cuts) == 1:
                    result[path] = _arrange(sharding, order, dtype)(piece)
                    continue
                if path not in result:
                    result[path] = _zeros(sharding, leaf.shape, dtype)()
                begin = [0] * len(order)
                begin[order.index(len(lead))] = cut.row
                if lead:
                    begin[0] = cut.layer
                result[path] = _place(sharding, order)(result[path], piece, np.int32(begin))
            self._in_flight.append(pieces)
            while sum(p.nbytes for ps in self._in_flight for p in ps) > _IN_FLIGHT_BYTES:
                jax.block_until_ready(self._in_flight.popleft())
        return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cut:
    """A piece: some layers, or some rows of one layer, counted on the file's first axis."""

    layer: int
    num_layers: int
    row: int
    num_rows: int


def _cuts(group: Sequence[Leaf], num_bytes: int) -> list[_Cut]:
    """Cut parameters into pieces of one size, of about `GROUP_BYTES` or less.

    Small layers are joined and large tensors are cut into rows, where the last piece may overlap
    the previous one. An axis that is sharded over devices stays whole.

    Args:
        num_bytes: of one tensor, which is one layer.
    """
    weight = group[0].weight
    total, rows = len(weight.names), weight.part_shape[0]
    fit = GROUP_BYTES // max(1, num_bytes)
    if fit:
        count = max(n for n in range(1, total + 1) if total % n == 0 and n <= fit)
        return [
            _Cut(layer=layer, num_layers=count, row=0, num_rows=rows)
            for layer in range(0, total, count)
        ]
    num_rows = rows
    if not any(_splits_rows(leaf) for leaf in group):
        num_rows = max(1, rows * GROUP_BYTES // num_bytes)
    return [
        _Cut(layer=layer, num_layers=1, row=min(row, rows - num_rows), num_rows=num_rows)
        for layer in range(total)
        for row in range(0, rows, num_rows)
    ]


def _splits_rows(leaf: Leaf) -> bool:
    """Return whether the file's first axis is sharded over devices."""
    axis = leaf.weight.order.index(0) + (leaf.weight.num_layers is not None)
    return leaf.sharding.shard_shape(leaf.shape)[axis] < leaf.shape[axis]


def _read_pieces(reader: hf_reader.Reader, group: Sequence[Leaf], cut: _Cut) -> list[jax.Array]:
    """Read one piece of every part, in the order of the file's axes."""
    entry = group[0].weight
    stacked = entry.num_layers is not None
    plans = []
    wants: list[list[tuple[hf_reader.Box, np.ndarray]]] = [[] for _ in range(cut.num_layers)]
    kind = hf_files.DTYPES[reader.tensors[entry.names[cut.layer]].dtype]
    for leaf in group:
        weight = leaf.weight
        shape = (cut.num_rows, *weight.part_shape[1:])
        if stacked:
            shape = (cut.num_layers, *shape)
        sharding = _disk_sharding(
            leaf.sharding, weight, all_layers=cut.num_layers == entry.num_layers
        )
        shards: dict[hf_reader.Box, np.ndarray] = {}
        for index in sharding.addressable_devices_indices_map(shape).values():
            box = _box(index, shape)
            if box in shards:
                continue
            shards[box] = np.empty([stop - begin for begin, stop in box], kind)
            inner = list(box[1:] if stacked else box)
            inner[0] = tuple(edge + cut.row for edge in inner[0])
            inner[weight.axis] = tuple(edge + weight.offset for edge in inner[weight.axis])
            for layer in range(*box[0]) if stacked else range(1):
                out = shards[box][layer - box[0][0]] if stacked else shards[box]
                wants[layer].append((tuple(inner), out))
        plans.append((shape, sharding, shards))
    for layer in range(cut.num_layers):
        reader.read_into(entry.names[cut.layer + layer], entry.view, wants[layer])
    if kind == np.float64:
        plans = [(n, s, _narrowed(shards, entry.template)) for n, s, shards in plans]
    return [
        jax.make_array_from_callback(
            shape, sharding, lambda index, s=shards, n=shape: s[_box(index, n)]
        )
        for shape, sharding, shards in plans
    ]


def _narrowed(shards: dict[hf_reader.Box, np.ndarray], name: str) -> dict:
    """Return float64 values as float32; they must be finite in that type too."""
    with np.errstate(over="ignore"):
        narrow = {box: values.astype(np.float32) for box, values in shards.items()}
    if not all(np.isfinite(values).all() for values in narrow.values()):
        raise ValueError(f"{name} holds values that are infinite as float32")
    return narrow


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> hf_reader.Box:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _disk_sharding(sharding: Sharding, weight: hf_names.Weight, *, all_layers: bool) -> Sharding:
    """Return the sharding of a piece on the file's axes that becomes `sharding` when transposed."""
    if not isinstance(sharding, NamedSharding):
        if len(sharding.device_set) > 1:
            raise ValueError(f"shardings must be NamedSharding or of one device, got {sharding}")
        return sharding
    lead = 0 if weight.num_layers is None else 1
    spec = (*sharding.spec, *(None,) * (lead + len(weight.order) - len(sharding.spec)))
    disk_spec: list[Any] = [None] * len(weight.order)
    for axis, disk_axis in enumerate(weight.order):
        disk_spec[disk_axis] = spec[lead + axis]
    layers = [spec[0] if all_layers else None] if lead else []
    return NamedSharding(sharding.mesh, PartitionSpec(*layers, *disk_spec))


@functools.cache
def _zeros(sharding: Sharding, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _place(sharding: Sharding, order: tuple[int, ...]) -> Any:
    def place(stack: jax.Array, piece: jax.Array, begin: jax.Array) -> jax.Array:
        piece = piece.transpose(order).astype(stack.dtype)
        return jax.lax.dynamic_update_slice(stack, piece, tuple(begin))

    return jax.jit(place, donate_argnums=0, out_shardings=sharding)


@functools.cache
def _arrange(sharding: Sharding, order: tuple[int, ...], dtype: np.dtype) -> Any:
    if order == tuple(range(len(order))):
        return lambda piece: piece if piece.dtype == dtype else piece.astype(dtype)
    return jax.jit(lambda piece: piece.transpose(order).astype(dtype), out_shardings=sharding)


def gather(group: Sequence[Leaf], values: Sequence[jax.Array], layer: int) -> np.ndarray:
    """Return one tensor of a checkpoint from the parameters that are its parts.

    Every process gets the whole tensor, of shape `view`; all of them must call this.
    """
    weights = [leaf.weight for leaf in group]
    sharding = values[0].sharding
    whole = None
    if isinstance(sharding, NamedSharding):
        whole = NamedSharding(sharding.mesh, PartitionSpec())
    orders = tuple(tuple(np.argsort(weight.order).tolist()) for weight in weights)
    stacked = weights[0].num_layers is not None
    array = _collect(whole, orders, weights[0].axis, stacked)(tuple(values), layer)
    return np.asarray(array.addressable_data(0))


@functools.cache
def _collect(
    whole: Sharding | None, orders: tuple[tuple[int, ...], ...], axis: int, stacked: bool
) -> Any:
    def collect(values: tuple[jax.Array, ...], layer: jax.Array) -> jax.Array:
        parts = values
        if stacked:
            parts = [jax.lax.dynamic_index_in_dim(v, layer, keepdims=False) for v in values]
        parts = [p.transpose(order) for p, order in zip(parts, orders, strict=True)]
        return jnp.concatenate(parts, axis) if len(parts) > 1 else parts[0]

    return jax.jit(collect, out_shardings=whole)
