"""DeepStack: features of tapped vision blocks, added to the first layers of the decoder."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.inputs import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepStack:
    """The features that the tapped vision blocks add to the first decoder layers."""

    levels: Leaf  # [Y, W, Q, D]  merged tokens of each tapped block
    slots: Leaf  # int32[B, T]  index of the merged token at each place, -1 for text

    @property
    def num_levels(self) -> int:
        return self.levels.shape[0]

    def add(self, x: Float[Array, "B T D"], layer: Int[Array, ""]) -> Float[Array, "B T D"]:
        """Add level `layer` to the output of that layer, if the level exists."""
        level = self.levels[jnp.minimum(layer, self.num_levels - 1)]
        slots = jnp.where(layer < self.num_levels, self.slots, -1)
        return x + place(level, slots).astype(x.dtype)


def place(tokens: Float[Array, "W Q D"], slots: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Return the merged token of each place, 0 where the slot is -1.

    Rows b of text and b * W // B of tokens belong together.
    """
    groups, num_tokens = tokens.shape[:2]
    flat = slots.reshape(groups, -1)  # [W, B / W * T]
    # Text reads beyond the end. With a dummy token instead, the gradient's scatter would add the
    # zeros of all text to one address, and a GPU does such additions one by one.
    flat = jnp.where(flat < 0, num_tokens, flat)
    placed = jnp.take_along_axis(tokens, flat[..., None], axis=1, mode="fill", fill_value=0)
    return placed.reshape(*slots.shape, -1)
