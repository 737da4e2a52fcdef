"""Names of the leaves of a tree: "params/text/layers/q/kernel"."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

Tree = Any


def path_name(path: Sequence) -> str:
    """Write a path of a tree as "a/b/0/c": of `jax.tree_util` keys or of plain names.

    The step from a Flax variable to its array is left out, so a parameter and its array, and the
    moments that copy the parameters' structure, are named alike.
    """
    parts = []
    for i, key in enumerate(path):
        match key:
            case jax.tree_util.DictKey() | jax.tree_util.FlattenedIndexKey():
                parts.append(str(key.key))
            case jax.tree_util.SequenceKey():
                parts.append(str(key.idx))
            case jax.tree_util.GetAttrKey():
                if not (key.name == "value" and i == len(path) - 1):
                    parts.append(key.name)
            case _:
                parts.append(str(key))
    return "/".join(parts)


def variables(state: nnx.State) -> dict[str, nnx.Variable]:
    """Return the variables of `state` by the name of their path."""
    return {path_name(path): variable for path, variable in nnx.to_flat_state(state)}


def named_leaves(tree: Tree) -> dict[str, Any]:
    """Return the leaves of any tree by the name of their path, in the order of the tree.

    Raises:
      ValueError: two leaves have one name ("a/b" as one key beside "a" over "b").
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_name(path)
        if name in leaves:
            raise ValueError(f"two leaves of the tree are named {name!r}")
        leaves[name] = leaf
    return leaves


def with_named_leaves(tree: Tree, leaves: Mapping[str, Any]) -> Tree:
    """Return `tree` with each leaf replaced by the one of its name in `leaves`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], tree)
