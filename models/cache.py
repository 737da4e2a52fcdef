"""The memory of decoding: the places of each row, and the prompts that rows share.

A row is a response, and its keys and values are those of its tokens. They stand in blocks of equal
size, which attention reads side by side, so that one long row does not hold up a step. A prompt is
held once for all rows that continue it, in blocks too. With a mesh each part holds some of the rows
and prompts, and numbers them from 0.
"""

import dataclasses
import functools

import jax
import numpy as np

from models.inputs import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts that rows share; a row that continues a prompt is a reader of it."""

    keys: Leaf  # by layer: [prompts x blocks, K, places, H]
    values: Leaf  # by layer: [prompts x blocks, K, places, H]
    lengths: Leaf  # int32[prompts]  places in use
    readers: Leaf  # int32[prompts, readers]  -1 for none
    number: Leaf  # int32[B]  the prompt of each row
    place: Leaf  # int32[B]  where the row stands among the prompt's readers


@dataclasses.dataclass(frozen=True)
class Layout:
    """The blocks of each row: rows come in classes of as many blocks as they may need.

    rows    0 1 2 3   4           two classes: four rows of one block, a row of three
    blocks  0 1 2 3   4 5 6
    """

    classes: tuple[tuple[int, int], ...]  # (rows, blocks a row)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Return the number of blocks of each row."""
        rows, blocks = zip(*self.classes, strict=True)
        return np.repeat(np.array(blocks, np.int32), rows)

    @functools.cached_property
    def first(self) -> np.ndarray:
        """Return the first block of each row."""
        return (np.cumsum(self.counts) - self.counts).astype(np.int32)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Return the row of each block."""
        return np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values, one array a layer, so that each is updated in place.

    Of one layer, `keys` and `values` are without the list over layers.
    """

    keys: Leaf  # by layer: [blocks, K, places, H]
    values: Leaf  # by layer: [blocks, K, places, H]
    layout: Layout = dataclasses.field(metadata={"static": True})
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
