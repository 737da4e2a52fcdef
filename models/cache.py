"""The memory of decoding: the places of each row, and the prompts that rows share.

A row is a response, and its keys and values are those of its tokens. Rows come in classes, each
with room for as many places as its rows may need. A prompt is held once for all rows that continue
it. With a mesh each part holds some of the rows and prompts, and numbers them from 0.
"""

import dataclasses

import jax

from models.inputs import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts that rows share; a row that continues a prompt is a reader of it."""

    keys: Leaf  # by layer: [prompts, K, places, H]
    values: Leaf  # by layer: [prompts, K, places, H]
    lengths: Leaf  # int32[prompts]  places in use
    readers: Leaf  # int32[prompts, readers]  -1 for none
    number: Leaf  # int32[B]  the prompt of each row
    place: Leaf  # int32[B]  where the row stands among the prompt's readers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values, one array a layer and class of rows, so that each is updated in place.

      rows    0 1 2 3 4 5        lengths, next_positions, is_running
      keys    [4, …]  [2, …]     two classes: rows 0 to 3 with few places, 4 and 5 with many

    Of one layer, `keys` and `values` are without the list over layers.
    """

    keys: Leaf  # by layer, by class: [rows, K, places, H]
    values: Leaf  # by layer, by class: [rows, K, places, H]
    lengths: Leaf  # int32[B]  places of the row in use
    next_positions: Leaf  # int32[B]  M-RoPE position of the next token
    is_running: Leaf  # bool[B]  the other rows read one place only; None: all run
    prompts: Leaf  # Prompts; None: the rows hold their prompts themselves

    def layer(self, number: int) -> "Cache":
        """Return the part of one layer."""
        prompts = self.prompts
        if prompts is not None:
            prompts = dataclasses.replace(
                prompts, keys=prompts.keys[number], values=prompts.values[number]
            )
        return dataclasses.replace(
            self, keys=self.keys[number], values=self.values[number], prompts=prompts
        )
