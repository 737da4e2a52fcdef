"""The number of responses in flight: slots and prompts that the devices' memory holds.

A slot has room for the tokens of its response, a place of the prompt store for one prompt. Where
memory does not hold every response at its longest, half of it goes to slots of a quarter of the
length: most responses end there, and those that do not move to a long slot when one is free.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from models.cache import Layout
from models.config import Qwen3VLConfig

_SAFE_FRACTION = 0.94  # of the free memory; the rest is for allocations that are not counted here
_SHORT = 4  # a short slot holds this part of the longest response …
_LEAST_SHORT = 512  # … unless that were fewer places
_MOST_BLOCK = 2048  # places of a block, which one group of a GPU's threads reads one after another
_ROWS = 8  # matrix products of other numbers of rows are padded, by copies of their inputs
_PREFILL_TOKENS = 8192  # most prompt tokens that a part reads at a time, unless one prompt has more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The responses to draw, over all devices, and the largest sizes among them."""

    num_groups: int  # prompts with the responses to them that share it
    num_responses: int
    group_responses: int  # most responses of a group
    prompt_tokens: int  # of the longest prompt
    prompt_patches: int  # of the prompt with most of them
    prompt_images: int  # one frame of a video counts as one
    response_tokens: int  # most that a response may have


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds of the plan."""

    num_parts: int  # of the mesh, among which slots are shared out
    num_cuts: int  # devices among which the kv heads and the vocabulary are cut
    free_bytes: int | None  # of each device; None: unknown, every response gets a slot
    num_slots: int | None  # most slots, over all devices
    multiple: int  # of places, that the attention kernel reads
    dtype: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the sampler's memory; of one part, unless they say otherwise."""

    num_parts: int
    classes: tuple[tuple[int, int], ...]  # (slots, places a slot), places increasing
    block_places: int  # of a block of a slot, see `models.cache`
    num_prompts: int  # that are held at a time
    prompt_places: int
    prompt_block_places: int
    width: int  # most slots that draw responses to one prompt
    prefill_prompts: int  # of the largest size, that are read at a time

    @property
    def num_slots(self) -> int:
        return sum(rows for rows, _ in self.classes)

    def layout(self) -> Layout:
        """Return the blocks of the slots."""
        return Layout(tuple((rows, places // self.block_places) for rows, places in self.classes))

    def line(self) -> str:
        """Return the line for the user."""
        slots = " + ".join(f"{self.num_parts * rows} x {places}" for rows, places in self.classes)
        return (
            f"sampling with {slots} tokens in slots, {self.num_parts * self.num_prompts} prompts x "
            f"{self.prompt_places} tokens"
        )


def free_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Return the memory that is free on the fullest device, the same in every process."""
    stats = [d.memory_stats() for d in devices if d.process_index == jax.process_index()]
    is_known = bool(stats) and all(one is not None and "bytes_limit" in one for one in stats)
    free = min(one["bytes_limit"] - one["bytes_in_use"] for one in stats) if is_known else None
    if jax.process_count() == 1:
        return free
    # In MiB: arrays hold no larger integers than 32 bits.
    mebibytes = np.int32(-1 if free is None else free >> 20)
    least = int(np.min(multihost_utils.process_allgather(mebibytes)))
    return None if least < 0 else least << 20


def round_up(size: int, multiple: int) -> int:
    """Return the least multiple that holds the size, at least one."""
    return -(-max(size, 1) // multiple) * multiple


def _in_blocks(size: int, multiple: int) -> tuple[int, int]:
    """Return the places of equal blocks that together hold `size`, and the places of one."""
    count = math.ceil(size / _MOST_BLOCK)
    block = round_up(math.ceil(size / count), multiple)
    return count * block, block


def make(config: Qwen3VLConfig, work: Work, limits: Limits) -> Plan:
    """Return the plan with the most slots that fit.

    Raises:
      ValueError: not even one slot a part fits.
    """
    long, block = _in_blocks(work.response_tokens, limits.multiple)
    wanted = math.ceil(work.num_responses / limits.num_parts)
    most = wanted
    if limits.num_slots is not None:
        most = min(wanted, max(1, limits.num_slots // limits.num_parts))
    width = min(work.group_responses, most)
    groups = math.ceil(work.num_groups / limits.num_parts)
    prompt_places, prompt_block = _in_blocks(work.prompt_tokens, limits.multiple)
    at_once = min(groups, max(1, _PREFILL_TOKENS // prompt_places))
    prefill_prompts = 1 << (at_once.bit_length() - 1)

    def plan(classes: tuple[tuple[int, int], ...], block: int) -> Plan:
        slots = sum(rows for rows, _ in classes)
        # Prompts whose last responses still run stand beside those that the others read.
        held = min(groups, slots, 3 * math.ceil(slots / width))
        return Plan(
            num_parts=limits.num_parts,
            classes=tuple(one for one in classes if one[0]),
            block_places=block,
            num_prompts=held,
            prompt_places=prompt_places,
            prompt_block_places=prompt_block,
            width=width,
            prefill_prompts=min(prefill_prompts, 1 << (held.bit_length() - 1)),
        )

    def is_held(candidate: Plan) -> bool:
        if limits.free_bytes is None:
            return True
        return needed_bytes(config, candidate, work, limits) <= _SAFE_FRACTION * limits.free_bytes

    every = plan(((most, long),), block)
    if is_held(every):
        return every
    short, short_block = _in_blocks(math.ceil(work.response_tokens / _SHORT), limits.multiple)
    for slots in range(most, 0, -1):
        if most > slots > _ROWS and slots % _ROWS:
            continue
        if short >= _LEAST_SHORT and slots > _SHORT:
            num_long = max(1, math.ceil(slots / (_SHORT + 1)))
            classes = ((slots - num_long, short), (num_long, _SHORT * short))
            candidate = plan(classes, short_block)
        else:
            candidate = plan(((slots, long),), block)
        if is_held(candidate):
            return candidate
    raise ValueError(
        f"no slot for a response of {long} tokens fits: {limits.free_bytes / 2**30:.1f} GiB are "
        "free on a device; lower the longest response, or cut the weights over more devices"
    )


def needed_bytes(config: Qwen3VLConfig, plan: Plan, work: Work, limits: Limits) -> int:
    """Return the memory that slots, prompts and temporaries take on a device."""
    text, size = config.text, jnp.dtype(limits.dtype).itemsize
    heads = text.num_kv_heads // limits.num_cuts
    place = 2 * text.num_layers * heads * text.head_dim * size
    places = sum(rows * length for rows, length in plan.classes)
    places += plan.num_prompts * plan.prompt_places
    # Logits in float32, scaled, with noise and filtered.
    logits = plan.num_slots * 4 * 4 * (text.vocab_size // limits.num_cuts)
    # The layers' keys and values until they are stored, and the activations of one layer.
    tokens = plan.prefill_prompts * plan.prompt_places
    wide = text.intermediate_size
    if text.moe is not None:
        wide = text.moe.num_experts_per_token * text.moe.intermediate_size
    activations = tokens * (place + size * (8 * text.hidden_size + 4 * wide // limits.num_cuts))
    if config.vision is not None:
        patches = plan.prefill_prompts * work.prompt_patches
        vision = config.vision
        activations += patches * (
            4 * vision.patch_dim + size * (12 * vision.hidden_size + 3 * vision.intermediate_size)
        )
    return places * place + max(logits, activations)
