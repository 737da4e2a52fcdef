"""How many responses fly at a time, at the sizes of the published models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import presets
from prism_jax import mesh as mesh_lib
from prism_jax.rollout import layout, memory

_CONFIG = presets.QWEN3_VL_4B
_WORK = memory.Work(
    num_groups=32,
    num_responses=512,
    group_responses=16,
    prompt_tokens=384,
    prompt_patches=1024,
    prompt_images=1,
    response_tokens=8192,
)


def _limits(free_bytes: float | None, **changes) -> memory.Limits:
    usual = {"num_parts": 1, "num_cuts": 1, "num_slots": None, "multiple": 64}
    free = None if free_bytes is None else int(free_bytes)
    return memory.Limits(**(usual | changes), free_bytes=free, dtype=jnp.bfloat16)


@pytest.mark.parametrize("free", [65e9, 30e9, 12e9, 3e9])
def test_what_is_planned_fits_and_a_slot_more_would_not_help(free):
    limits = _limits(free)
    plan = memory.make(_CONFIG, _WORK, limits)
    needed = memory.needed_bytes(_CONFIG, plan, _WORK, limits)
    assert 0.5 * free < needed / 0.94 <= free or plan.num_slots == 1
    # A response may always be as long as asked for.
    assert plan.classes[-1][1] == 8192
    assert 1 <= plan.num_prompts <= plan.num_slots
    fewer = memory.make(_CONFIG, _WORK, _limits(0.8 * free))
    assert fewer.num_slots <= plan.num_slots


def test_an_80_gb_card_has_three_times_the_slots_of_equal_ones():
    # 4B in bfloat16 leaves about 65 GB; a slot for 8192 tokens takes 1.2 GB.
    plan = memory.make(_CONFIG, _WORK, _limits(65e9))
    (num_short, short), (num_long, long) = plan.classes
    assert (short, long) == (2048, 8192)
    assert num_short + num_long > 2 * 65e9 / (8192 * 147_456)
    # About half of the places are those of long slots.
    assert 0.4 < num_long * long / (num_long * long + num_short * short) < 0.6


def test_where_memory_is_enough_or_unknown_every_response_has_a_slot():
    for limits in (_limits(None), _limits(2e12)):
        plan = memory.make(_CONFIG, _WORK, limits)
        assert plan.classes == ((512, 8192),)
        assert plan.num_prompts == 32


# Of the longest response and prompt, for a kernel that reads multiples of 64: one block, the most
# that one holds, one place more, and three.
@pytest.mark.parametrize(
    ("tokens", "places", "block"),
    [(1, 64, 64), (2048, 2048, 2048), (2049, 2176, 1088), (5000, 5184, 1728)],
)
def test_long_responses_and_prompts_stand_in_equal_blocks(tokens, places, block):
    work = dataclasses.replace(_WORK, response_tokens=tokens, prompt_tokens=tokens)
    plan = memory.make(_CONFIG, work, _limits(None))
    assert plan.classes == ((512, places),)
    assert (plan.block_places, plan.prompt_places) == (block, places)
    assert plan.layout().classes == ((512, places // block),)
    assert plan.prompt_block_places == block


def test_a_long_slot_has_the_blocks_of_four_short_ones():
    work = dataclasses.replace(_WORK, response_tokens=5000)
    plan = memory.make(_CONFIG, work, _limits(30e9))
    (num_short, short), (num_long, long) = plan.classes
    assert (short, long, plan.block_places) == (1280, 5120, 1280)
    assert plan.layout().classes == ((num_short, 1), (num_long, 4))
    # Other numbers of rows would be padded.
    assert plan.num_slots % 8 == 0


def test_slots_are_shared_out_among_the_parts_and_can_be_bounded():
    work = dataclasses.replace(_WORK, num_groups=64, num_responses=64, group_responses=1)
    assert memory.make(_CONFIG, work, _limits(None, num_parts=64)).classes == ((1, 8192),)
    bounded = memory.make(_CONFIG, _WORK, _limits(None, num_parts=4, num_slots=40))
    assert (bounded.num_slots, bounded.num_parts, bounded.width) == (10, 4, 10)


def test_memory_for_less_than_one_response_is_told():
    with pytest.raises(ValueError, match=r"no slot for a response of 8192 tokens fits: 0\.9 GiB"):
        memory.make(_CONFIG, _WORK, _limits(1e9))


@pytest.mark.parametrize(("gigabytes", "tensor"), [(None, 1), (60, 1), (16, 2), (8, 4), (1, 8)])
def test_weights_are_cut_no_further_than_memory_asks(monkeypatch, gigabytes, tensor):
    free = None if gigabytes is None else int(gigabytes * 1e9)
    monkeypatch.setattr(memory, "free_bytes", lambda devices: free)
    devices = mesh_lib.make({"data": -1, "fsdp": 1, "tensor": 1, "expert": 1})
    # 8 GB in bfloat16, and 65 536 tokens of 147 456 bytes beside them.
    params = nnx.State({"w": nnx.Param(jax.ShapeDtypeStruct((4_000_000_000,), np.float32))})
    chosen = layout.choose_tensor(params, _CONFIG, devices=devices, dtype=jnp.bfloat16)
    assert chosen == tensor
