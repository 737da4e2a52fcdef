"""Packed rows of segments, as the discriminator reads them.

A row holds prompts with one segment each, scored at the segment's last token:

    row       P P P c c c  P P P d d  .       P a prompt, c and d segments of two responses
    scored              *          *
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from models import inputs
from models.config import Qwen3VLConfig
from models.inputs import Example
from prism_jax import batches
from prism_jax import rows as packed_rows
from prism_jax.rows import Continuation, RowShape

# Of a sequence's tokens: "mrope", as the policy has them; "text_1d", one number each.
Positions = Literal["mrope", "text_1d"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentBatch:
    """Packed segments in M microbatches of B rows, each with U places for segments."""

    text: Any  # TextInput [M, B, T]
    vision: Any  # VisionInput [M, B, P] or None
    last: Any  # int32[M, B, U]  place in the row of the segment's last token; 0 without a segment
    kind: Any  # int32[M, B, U]  kind of text, see `models.kinds`; 0 without a segment
    num_tokens: Any  # int32[M, B, U]  of the segment; 0 without one
    is_segment: Any  # bool[M, B, U]
    # int32[M, B, U / 2]  name of the pair of segments 2i (teacher) and 2i + 1 (student), -1 for
    # none; None where segments are not in pairs
    pair_name: Any
    # float32[M, B, U] or None  gradient of the loss with respect to the score
    score_gradients: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedSegments:
    """This process's rows of a batch, and the place of each segment, to read its score."""

    batch: SegmentBatch
    places: list[packed_rows.Place]
    shape: RowShape

    def read(self, scores: np.ndarray) -> np.ndarray:
        """Return the scores of the segments in their order, from float32[M, B, U] of all rows."""
        rows = np.asarray(scores).reshape(self.shape.num_rows, -1)
        return np.array([rows[place.row, place.slot] for place in self.places], np.float32)

    def indices(self) -> np.ndarray:
        """Return int32[segments]: the place of each in the scores [M, B, U] laid flat."""
        slots = self.shape.row_sequences
        return np.array([place.row * slots + place.slot for place in self.places], np.int32)


def segment_rows(
    prompts: Sequence[Example],
    units: Sequence[Sequence[Continuation]],
    names: Sequence[int],
    kinds: Sequence[int],
    shape: RowShape,
    config: Qwen3VLConfig,
    *,
    positions: Positions,
) -> PackedSegments:
    """Return prompts with segments in rows.

    Args:
      units: a segment by itself, or teacher's and student's segment of a pair.
      names: number of each unit's name.
      kinds: kind of each name to the model.
    """
    packed = packed_rows.pack(prompts, units, shape, config)
    sides = {len(unit) for unit in units}
    return of_packed(packed, names, kinds, shape, positions=positions, is_paired=sides == {2})


def of_packed(
    packed: packed_rows.Packed,
    names: Sequence[int],
    kinds: Sequence[int],
    shape: RowShape,
    *,
    positions: Positions,
    is_paired: bool,
) -> PackedSegments:
    """Return the batch of packed units; see `segment_rows`."""
    local = shape.local_places
    last, kind, num_tokens = (
        np.zeros((len(local), shape.row_sequences), np.int32) for _ in range(3)
    )
    is_segment = np.zeros((len(local), shape.row_sequences), bool)
    pair_name = np.full((len(local), shape.row_sequences // 2), -1, np.int32) if is_paired else None
    sides = 2 if is_paired else 1
    for number, place in enumerate(packed.places):
        if place.row not in local:
            continue
        row, name = local[place.row], names[number // sides]
        last[row, place.slot] = place.start + place.num_tokens - 1
        kind[row, place.slot] = kinds[name]
        num_tokens[row, place.slot] = place.num_tokens
        is_segment[row, place.slot] = True
        if is_paired:
            pair_name[row, place.slot // 2] = name
    text = packed.text
    if positions == "text_1d":
        text = dataclasses.replace(text, positions=_positions(text))
    arrays = {
        "last": last,
        "kind": kind,
        "num_tokens": num_tokens,
        "is_segment": is_segment,
        "pair_name": pair_name,
    }
    batch = SegmentBatch(
        text=text,
        vision=packed.vision,
        score_gradients=None,
        **batches.split(arrays, shape.num_microbatches),
    )
    return PackedSegments(batch=batch, places=packed.places, shape=shape)


def _positions(text: inputs.TextInput) -> np.ndarray:
    """Return the positions in one dimension, for shared prompts those of their first copies."""
    if text.shared is None:
        return _in_one_dimension(text.segments.ids)
    expanded = _in_one_dimension(text.shared.segments.ids)
    expanded = np.pad(expanded, ((0, 0),) * 3 + ((0, 1),))  # a place for none
    shared = text.shared
    places = np.concatenate([shared.copies[..., 0], shared.followers], axis=-1)
    return np.take_along_axis(expanded, places[:, None], axis=-1)


def _in_one_dimension(ids: np.ndarray) -> np.ndarray:
    """Return int32[M, 3, B, T]: the number of tokens before each in its sequence, image or not.

    Source: PRISM verl/verl/workers/critic/dp_critic.py:177, vllm_rollout_spmd.py:463.
    """
    places = np.broadcast_to(np.arange(ids.shape[-1], dtype=np.int32), ids.shape)
    is_first = np.diff(ids, axis=-1, prepend=-1) != 0
    firsts = np.maximum.accumulate(np.where(is_first, places, 0), axis=-1)
    return np.repeat((places - firsts)[:, None], 3, axis=1)
