"""Names of the leaves of a tree: "params/text/layers/q/kernel"."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

Tree = Any


def path_name(path: Sequence) -> str:
    """Write a path of a tree as "a/b/0/c", from `jax.tree_util` keys or plain names.

    The step from a Flax variable to its array is left out, so that a parameter, its array and its
    optimizer moments have the same name.
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
    """Return the variables of `state` by path name."""
    return {path_name(path): variable for path, variable in nnx.to_flat_state(state)}


def named_leaves(tree: Tree) -> dict[str, Any]:
    """Return the leaves of any tree by path name, in the order of the tree.

    Raises:
      ValueError: two leaves have the same name (a key "a/b" beside "a" over "b").
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_name(path)
        if name in leaves:
            raise ValueError(f"two leaves of the tree are named {name!r}")
        leaves[name] = leaf
    return leaves


def with_named_leaves(tree: Tree, leaves: Mapping[str, Any]) -> Tree:
    """Return `tree` with each leaf replaced by the leaf of that name in `leaves`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], tree)
