"""The metadata of a checkpoint, and its comparison with the run that opens it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from prism_jax import tree_paths
from prism_jax.checkpoints import checksum
from prism_jax.training import train_state

FORMAT = 2
WITHOUT_DIGESTS = 1  # an older format that is still read
STATE_ITEM = "opt_state"
PARAMS_ITEM = "params"
_NUM_NAMED = 10

Tree = Any
Json = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The identity of the run that writes a checkpoint; no other run continues it by mistake."""

    project_version: str
    stage: str
    config: Mapping[str, Json]
    model_config: Mapping[str, Json]
    # Dotted prefixes of config keys that may change between a run and its continuation ("mesh").
    may_differ: tuple[str, ...]

    def config_hash(self) -> str:
        """Return 16 hex digits of the SHA-256 of stage, configuration and model."""
        text = json.dumps(self._compared(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, meta: Mapping[str, Json]) -> list[str]:
        """List each key, with both values, in which `meta` differs from this run."""
        here = self._compared()
        other = dataclasses.replace(
            self, stage=meta["stage"], config=meta["config"], model_config=meta["model_config"]
        )
        there = other._compared()
        absent = "absent"
        return [
            f"{key}: {there.get(key, absent)!r} in the checkpoint, {here.get(key, absent)!r} here"
            for key in sorted(set(here) | set(there))
            if key not in here or key not in there or here[key] != there[key]
        ]

    def _compared(self) -> dict[str, Json]:
        # Through JSON, so that tuples compare equal to the lists that are read back.
        flat = {"stage": self.stage}
        flat |= _flatten("config", json.loads(json.dumps(self.config)))
        flat |= _flatten("model", json.loads(json.dumps(self.model_config)))
        free = tuple(f"config.{prefix}" for prefix in self.may_differ)
        return {
            key: value
            for key, value in flat.items()
            if not any(key == prefix or key.startswith(prefix + ".") for prefix in free)
        }


def split_items(state: Tree) -> dict[str, dict[str, Any]]:
    """Split a state into the items of a checkpoint, each as leaves by name.

    The parameters of each TrainState form a separate item, "params" or, for the one under the key
    "policy", "policy.params"; all the rest is the item "opt_state".
    """
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda x: isinstance(x, train_state.TrainState)
    )
    prefixes = [
        "/".join(filter(None, (tree_paths.path_name(path), PARAMS_ITEM)))
        for path, node in nodes
        if isinstance(node, train_state.TrainState)
    ]
    items: dict[str, dict[str, Any]] = {STATE_ITEM: {}}
    items |= {prefix.replace("/", "."): {} for prefix in prefixes}
    for name, leaf in tree_paths.named_leaves(state).items():
        for prefix in prefixes:
            if name.startswith(prefix + "/"):
                items[prefix.replace("/", ".")][name.removeprefix(prefix + "/")] = leaf
                break
        else:
            items[STATE_ITEM][name] = leaf
    return items


def join_items(state: Tree, items: Mapping[str, Mapping[str, Any]]) -> Tree:
    """Return `state` with its leaves taken from items in the form of `split_items`."""
    leaves = dict(items[STATE_ITEM])
    for item, values in items.items():
        if item != STATE_ITEM:
            leaves |= {f"{item.replace('.', '/')}/{name}": x for name, x in values.items()}
    return tree_paths.with_named_leaves(state, leaves)


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Turn {"a/b": x} into {"a": {"b": x}}, the form in which arrays are stored."""
    nested: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = nested
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return nested


def describe(
    identity: RunIdentity,
    items: Mapping[str, Mapping[str, jax.Array]],
    sums: Mapping[str, Mapping[str, checksum.Checksum]],
) -> dict[str, Json]:
    """Return the JSON stored with the arrays: their writer, shapes and checksums."""
    return {
        "format": FORMAT,
        "project_version": identity.project_version,
        "stage": identity.stage,
        "config": dict(identity.config),
        "config_hash": identity.config_hash(),
        "model_config": dict(identity.model_config),
        "leaves": {
            item: {
                name: {
                    "shape": list(leaf.shape),
                    "dtype": leaf.dtype.name,
                    "checksum": [sums[item][name].plain, sums[item][name].weighted],
                }
                for name, leaf in leaves.items()
            }
            for item, leaves in items.items()
        },
    }


def shape_differences(
    saved: Mapping[str, Json], wanted: Mapping[str, Any], *, with_dtype: bool
) -> list[str]:
    """List the leaves that are missing, extra, or of another shape (and dtype) in a checkpoint."""
    differences = [f"{name}: not in the checkpoint" for name in sorted(set(wanted) - set(saved))]
    differences += [f"{name}: only in the checkpoint" for name in sorted(set(saved) - set(wanted))]
    for name in sorted(set(saved) & set(wanted)):
        there, here = saved[name], wanted[name]
        is_same = tuple(there["shape"]) == tuple(here.shape)
        if with_dtype:
            is_same = is_same and there["dtype"] == here.dtype.name
        if not is_same:
            differences.append(
                f"{name}: {there['dtype']}{tuple(there['shape'])} in the checkpoint, "
                f"{here.dtype.name}{tuple(here.shape)} here"
            )
    return differences


def corrupt_leaves(saved: Mapping[str, Json], sums: Mapping[str, checksum.Checksum]) -> list[str]:
    """List the leaves whose checksum is not the stored one."""
    return [
        name
        for name, current in sums.items()
        if list(saved[name]["checksum"]) != [current.plain, current.weighted]
    ]


def lines(items: Sequence[str]) -> str:
    """Write the first items, a line each, and the number of the others."""
    more = [f"... and {len(items) - _NUM_NAMED} more"] if len(items) > _NUM_NAMED else []
    return "\n".join(f"  {text}" for text in [*items[:_NUM_NAMED], *more])


def _flatten(prefix: str, value: Json) -> dict[str, Json]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Json] = {}
    for key, inner in value.items():
        flat |= _flatten(f"{prefix}.{key}", inner)
    return flat
