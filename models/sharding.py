"""Logical axes, and the rules that lay them on the axes of a mesh.

Each parameter names its logical axes (`nnx.Param` metadata `axes`); activations name theirs where
they are constrained. Rules come from the configuration, and the mesh from `jax.set_mesh`.
"""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec

# Axes of parameters: `layers` is the stack that `lax.scan` walks over.
PARAM_AXES = (
    "layers",
    "vocab",
    "embed",
    "heads",
    "kv_heads",
    "mlp",
    "experts",
    "router",
    "norm",
    "patch",
    "vision_embed",
    "vision_heads",
    "vision_mlp",
    "vision_positions",
    "score",
)
# Axes of activations: `images` are the rows of the vision tower.
ACTIVATION_AXES = (
    "batch",
    "images",
    "act_length",
    "act_embed",
    "act_heads",
    "act_kv_heads",
    "act_mlp",
    "act_experts",
    "act_vocab",
)

MeshAxes = None | str | tuple[str, ...]


def axis_names(axes: MeshAxes | Sequence[str]) -> tuple[str, ...]:
    """Return the mesh axes of one entry of the rules, or of a partition, as a tuple."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


@dataclasses.dataclass(frozen=True)
class Rules:
    """The mesh axes of each logical axis; None means replicated, a missing rule is an error."""

    pairs: tuple[tuple[str, MeshAxes], ...]

    def __post_init__(self):
        known = set(PARAM_AXES + ACTIVATION_AXES)
        unknown = [name for name, _ in self.pairs if name not in known]
        if unknown:
            raise ValueError(f"sharding rules name unknown logical axes {unknown}, known: {known}")

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """Return the mesh axes of one logical axis; none where it is replicated."""
        if axis is None:
            return ()
        for name, mesh_axes in self.pairs:
            if name == axis:
                return axis_names(mesh_axes)
        raise ValueError(f"sharding rules hold no entry for the logical axis {axis!r}")


REPLICATED = Rules(tuple((axis, None) for axis in PARAM_AXES + ACTIVATION_AXES))


def spec(rules: Rules, *axes: str | None) -> PartitionSpec:
    """Return the partition of an array with these logical axes.

    Raises ValueError when two dimensions of the array land on one mesh axis.
    """
    parts = [rules.mesh_axes(axis) for axis in axes]
    used: dict[str, str | None] = {}
    for axis, part in zip(axes, parts, strict=True):
        for mesh_axis in part:
            if mesh_axis in used:
                raise ValueError(
                    f"sharding rules put the logical axes {used[mesh_axis]!r} and {axis!r} of one "
                    f"array {axes} on the mesh axis {mesh_axis!r}"
                )
            used[mesh_axis] = axis
    return PartitionSpec(*parts)


def constrain(x: jax.Array, rules: Rules, *axes: str | None) -> jax.Array:
    """Lay an activation on the mesh by its logical axes; without a mesh return it as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(rules, *axes))
