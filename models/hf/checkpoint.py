"""Load a Hugging Face checkpoint into sharded parameters, and write parameters back as one.

Tensors are handled one at a time. Loading reads only the shards of this process's devices, and
stacks layers on the device. Saving gathers one tensor and writes it. Nothing is ever unpickled.
"""

import collections
import contextlib
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from models import config as config_lib
from models.hf import check as hf_check
from models.hf import files as hf_files
from models.hf import names as hf_names
from models.hf import reader as hf_reader
from models.hf import stream as hf_stream
from models.hf import writer as hf_writer
from models.hf.stream import Leaf

Values = dict[str, Any]  # contents of the parameters (arrays, shapes, shardings), by path
Made = dict[str, tuple[list[Leaf], int]]  # by tensor: the parameters that it consists of, the layer


def values_by_path(state: nnx.State) -> Values:
    """Return the contents of the parameters, by path."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _groups(leaves: Iterable[Leaf]) -> list[list[Leaf]]:
    """Put parameters that are parts of the same tensors together, in the order of the parts."""
    groups: dict[str, list[Leaf]] = collections.defaultdict(list)
    for leaf in leaves:
        groups[leaf.weight.template].append(leaf)
    for template, group in groups.items():
        group.sort(key=lambda leaf: leaf.weight.part)
        parts = group[0].weight.parts
        if [leaf.weight.part for leaf in group] != list(range(parts)):
            paths = [leaf.path for leaf in group]
            raise ValueError(f"{template} has {parts} parts, the model only {paths}")
    return list(groups.values())


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read `config.json` of a checkpoint folder."""
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    hf_files.refuse_adapter(path)
    return hf_files.read_json(hf_files.inside(path, "config.json"))


def load(
    folder: str | os.PathLike[str],
    abstract_state: nnx.State,
    *,
    shardings: nnx.State | Sharding | None,
    dtype: DTypeLike | None,
    fresh: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> nnx.State:
    """Load parameters from a checkpoint folder, each directly in its shards.

    A `lm_head.weight` that repeats the embedding is accepted for a tied model; a discriminator has
    no head, so any `lm_head.weight` is ignored there. If the folder has a `manifest.json`, process
    0 compares the files with it first.

    Args:
        abstract_state: `nnx.split(nnx.eval_shape(…))`, the parameters alone.
        shardings: a state of the same structure with a NamedSharding for each parameter, or one
            single-device sharding for all; None is JAX's default device.
        dtype: type of all parameters; None keeps each stored type, except that float64 becomes
            float32.
        fresh: paths of parameters that the checkpoint does not hold and the caller makes, such as
            `score.kernel` of a new discriminator; they stay abstract in the result.
        drop: prefixes of tensor names that are left unused on purpose, such as `model.visual.`.

    Raises ValueError for a folder that is not safe and whole (see `files.list_tensors`), one that
    lists all tensors that are missing, unused, or of another shape or type, and one that names a
    weight with NaN or infinity in it.
    """
    shapes = {path: value.shape for path, value in values_by_path(abstract_state).items()}
    unknown = [path for path in fresh if path not in shapes]
    if unknown:
        raise ValueError(f"fresh names parameters that the model does not have: {unknown}")
    names = hf_names.naming(read_config(folder))
    wanted = {path: shape for path, shape in shapes.items() if path not in fresh}
    on_devices = _on_devices(shardings, shapes)
    loaded: dict[str, jax.Array] = {}
    with hf_reader.open_folder(folder, check_manifest=False) as reader:
        loader = hf_stream.Loader(reader)
        table = hf_check.table(reader, wanted, names, drop)
        _check_manifest(reader)
        leaves = [
            Leaf(
                path=path,
                shape=shapes[path],
                weight=weight,
                sharding=on_devices[path],
                dtype=None if dtype is None else jnp.dtype(dtype),
            )
            for path, weight in table.items()
        ]
        for group in _groups(leaves):
            loaded |= loader.load(group)
    result = []
    for parts, leaf in nnx.to_flat_state(abstract_state):
        path = ".".join(map(str, parts))
        result.append((parts, leaf.replace(loaded[path]) if path in loaded else leaf))
    return nnx.from_flat_state(result)


def _check_manifest(reader: hf_reader.Reader) -> None:
    """Raise ValueError in every process when the files differ from the manifest."""
    problem = None
    if jax.process_index() == 0:
        try:
            files = {tensor.file for tensor in reader.tensors.values()}
            hf_files.compare_manifest(reader.path, files)
        except ValueError as error:
            problem = str(error)
    _agree(problem, f"{reader.path}: process 0 found another file than its manifest names")


def _agree(problem: str | None, elsewhere: str) -> None:
    """Raise ValueError in every process when process 0 has a problem."""
    if jax.process_count() > 1 and not multihost_utils.broadcast_one_to_all(
        np.asarray(problem is None)
    ):
        problem = problem or elsewhere
    if problem is not None:
        raise ValueError(problem)


def _on_devices(
    shardings: nnx.State | Sharding | None, paths: Iterable[str]
) -> dict[str, Sharding]:
    """Return the sharding of every parameter."""
    if shardings is None:
        shardings = SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, Sharding):
        return dict.fromkeys(paths, shardings)
    by_path = values_by_path(shardings)
    differ = sorted(set(by_path) ^ set(paths))
    if differ:
        raise ValueError(f"shardings and parameters differ in {differ[:10]}")
    return by_path


def save(
    folder: str | os.PathLike[str],
    state: nnx.State,
    config_json: Mapping[str, Any],
    *,
    layout: hf_names.ExpertLayout,
    max_shard_bytes: int,
    copy_from: str | os.PathLike[str] | None,
    carry: Sequence[str] = (),
) -> None:
    """Write parameters, in their types, as a checkpoint folder that `transformers` loads.

    In a run of several processes all call this; process 0 writes. The folder appears when it is
    complete (see `writer.write_folder`). An untied discriminator has no output head, but the
    classes of `transformers` need one: `lm_head.weight` is then carried over from `copy_from`.

    Args:
        config_json: written unchanged to `config.json`; the tensor names depend on it.
        layout: order of fused experts; without experts it does not matter.
        copy_from: folder whose tokenizer and processor files are copied, None for none.
        carry: prefixes of tensors copied from `copy_from`, such as `model.visual.` without a tower.

    Raises ValueError when the target is not empty, or model and `config_json` do not agree on a
    tied head.
    """
    target = pathlib.Path(folder)
    source = None if copy_from is None else pathlib.Path(copy_from)
    _check_target(target)
    values = values_by_path(state)
    names = hf_names.naming(config_json)
    carry = (*carry, *_needed_head(values, config_json, source))
    made, planned = _plan(values, names, layout)
    with contextlib.ExitStack() as stack:
        reader = None
        if carry:
            reader = stack.enter_context(_open_carried(source, carry))
            planned += _carried(reader, carry, made)
        planned.sort(key=lambda tensor: natural(tensor.name))
        shards = hf_writer.shards(planned, max_shard_bytes)

        def produce(tensor: hf_writer.Planned) -> Iterator[Any]:
            if tensor.name in made:
                group, layer = made[tensor.name]
                array = hf_stream.gather(group, [values[leaf.path] for leaf in group], layer)
                yield array.reshape(-1).view(np.uint8)
            else:
                yield from reader.blocks(tensor.name, hf_stream.GROUP_BYTES)

        if jax.process_index() == 0:
            hf_writer.write_folder(
                target, shards, produce, config_json=config_json, copy_from=source
            )
        else:  # take part in gathering
            for tensor in (tensor for shard in shards for tensor in shard if tensor.name in made):
                collections.deque(produce(tensor), maxlen=0)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("hf.save")


def _plan(
    values: Values, names: hf_names.Naming, layout: hf_names.ExpertLayout
) -> tuple[Made, list[hf_writer.Planned]]:
    """Return the parameters that each tensor consists of, and the tensors to write."""
    made: Made = {}
    planned = []
    for group in _groups(
        Leaf(
            path=path,
            shape=value.shape,
            weight=hf_names.weight(path, value.shape, names, layout),
            sharding=None,
            dtype=value.dtype,
        )
        for path, value in values.items()
    ):
        first = group[0]
        if len({leaf.dtype for leaf in group}) > 1:
            types = ", ".join(f"{leaf.path} {leaf.dtype}" for leaf in group)
            raise ValueError(
                f"the parts of {first.weight.template} must be of one type, got {types}"
            )
        kind = hf_writer.dtype_name(first.dtype, first.path)
        for layer, name in enumerate(first.weight.names):
            made[name] = (group, layer)
            planned.append(hf_writer.Planned(name, kind, first.weight.disk_shape))
    return made, planned


def _carried(
    reader: hf_reader.Reader, carry: tuple[str, ...], made: Made
) -> list[hf_writer.Planned]:
    """Return the source's tensors to copy; the model must have none of them."""
    tensors = [t for t in reader.tensors.values() if t.name.startswith(carry)]
    twice = [tensor.name for tensor in tensors if tensor.name in made]
    if twice:
        raise ValueError(f"carry names tensors that the model has itself: {twice[:10]}")
    return [hf_writer.Planned(t.name, t.dtype, t.shape) for t in tensors]


def _check_target(target: pathlib.Path) -> None:
    """Raise ValueError in every process when process 0 cannot write to the target."""
    problem = hf_writer.check_target(target) if jax.process_index() == 0 else None
    _agree(problem, f"{target} cannot be written to by process 0")


def _needed_head(
    values: Values, config_json: Mapping[str, Any], source: pathlib.Path | None
) -> tuple[str, ...]:
    """Return the head's name if it must be carried over; check that config and model agree."""
    tied = config_lib.from_hf(config_json).text.tie_word_embeddings
    if "text.head.embedding" in values:
        if tied:
            raise ValueError("config.json ties the head to the embedding, the model has a head")
        return ()
    if tied:
        return ()
    if not any(path.startswith("trunk.") for path in values):
        raise ValueError("config.json says that the head is not tied, the model has no head")
    if source is None:
        raise ValueError(
            f"config.json says that the head is not tied: copy_from must name a folder from which "
            f"{hf_names.HEAD} is carried over, because a discriminator has no head"
        )
    return (hf_names.HEAD,)


def _open_carried(source: pathlib.Path | None, carry: Sequence[str]) -> hf_reader.Reader:
    """Open the folder that tensors are carried over from; every prefix must find one."""
    if source is None:
        raise ValueError(f"carry = {list(carry)} needs copy_from")
    reader = hf_reader.open_folder(source, check_manifest=True)
    lacking = [p for p in carry if not any(name.startswith(p) for name in reader.tensors)]
    if lacking:
        raise ValueError(f"{source} holds no tensor that begins with {', '.join(lacking)}")
    return reader


def natural(name: str) -> list[Any]:
    """Return a sort key by which layer 2 comes before layer 10."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", name)]
