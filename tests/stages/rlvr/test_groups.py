"""The groups of a step of RLVR: filled until enough vary, and the surplus kept for the next."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax import errors
from prism_jax.rewards import score
from prism_jax.stages.rlvr import carry as rlvr_carry
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import groups as rlvr_groups
from tests.stages import rl_toy
from tests.stages.rlvr import changes as changes_lib


def _group(accuracies, *, step=1, index=0):
    rewards = [score.Reward(total=a, accuracy=a, format=1.0, reason="correct") for a in accuracies]
    found = tuple(
        rlvr_groups.Response(tokens=None, logprobs=None, segments=None, reward=reward)
        for reward in rewards
    )
    return rlvr_groups.Group(index=index, row=None, prompt=None, responses=found, step=step)


def _refill(**changes):
    usual = {
        "keep": "accuracy",
        "generation_prompts": 3,
        "max_generations": 3,
        "when_short": "error",
        "surplus_steps": 1,
    }
    return rlvr_config.Groups(**(usual | changes))


def test_a_step_is_filled_with_groups_that_vary_the_oldest_first():
    def draw(number):
        first = 10 * (number + 1)
        return [
            _group([0, 1], step=2, index=first),
            _group([1, 1], step=2, index=first + 1),
            _group([1, 0], step=2, index=first + 2),
        ]

    kept = [_group([0, 1], step=1, index=1)]
    filled = rlvr_groups.fill(kept, draw, _refill(), num_prompts=4, step=2)
    assert [group.index for group in filled.groups] == [1, 10, 12, 20]
    assert [group.index for group in filled.surplus] == [22]
    assert (filled.num_drawn, filled.num_varying, filled.num_generations) == (6, 4, 2)
    thrown = rlvr_groups.fill(kept, draw, _refill(surplus_steps=0), num_prompts=4, step=2)
    assert thrown.surplus == []
    # Groups of step 1 may be used until step 2, those of step 2 until step 3.
    old = [_group([0, 1], step=1, index=index) for index in range(3)]
    filled = rlvr_groups.fill(old, draw, _refill(), num_prompts=2, step=2)
    assert [group.index for group in filled.groups] == [0, 1] and filled.surplus == []
    assert filled.num_generations == 0


def test_too_few_groups_that_vary_stop_the_run_or_make_a_smaller_step():
    def draw(number):
        return [_group([1, 1]), _group([0, 1], index=number)]

    with pytest.raises(errors.InputError, match=r"step 7: .* 3 prompts of 6 .* 4 are needed"):
        rlvr_groups.fill([], draw, _refill(), num_prompts=4, step=7)
    filled = rlvr_groups.fill([], draw, _refill(when_short="train"), num_prompts=4, step=7)
    assert [group.index for group in filled.groups] == [0, 1, 2]


class _FirstOnly:
    """Call the first response of a generation right, if any: at most one group varies."""

    def __init__(self, *, is_any_right):
        self._is_any_right = is_any_right

    def grade(self, tasks):
        right = [self._is_any_right and number == 0 for number in range(len(tasks))]
        return [rl_toy.reward_of("b" if one else "a", ended=True) for one in right]


@pytest.mark.parametrize(
    ("changes", "is_any_right", "num_empty"),
    [
        ({"train.num_minibatches": 1}, False, 1),
        ({"train.num_minibatches": 2}, False, 2),
        # Two generations of one group each: the second part has none.
        ({"train.num_minibatches": 2}, True, 1),
    ],
)
def test_an_update_without_any_group_moves_neither_parameters_nor_momentum(
    changes, is_any_right, num_empty
):
    run = rl_toy.Run(
        rl_toy.options_of("", changes_lib.REFILL | {"groups.surplus_steps": 0} | changes)
    )
    run.take(2)
    before = jax.device_get(run.state)
    assert np.abs(before.opt_state.inner["plain"].mu["logits"]).max() > 0
    run.experience.sampling._judge = _FirstOnly(is_any_right=is_any_right)
    row = run.take(1).rows[-1]
    assert row["rollout/trained_prompts"] == 2 * is_any_right
    assert row["rollout/generations"] == 2
    assert (row["optim/empty_updates"], row["optim/skipped_updates"]) == (num_empty, 0)
    after = jax.device_get(run.state)
    assert (
        int(after.opt_state.inner["plain"].count - before.opt_state.inner["plain"].count)
        == is_any_right
    )
    moved = jax.tree.map(
        lambda x, y: bool((np.asarray(x) != np.asarray(y)).any()),
        (before.params, before.opt_state),
        (after.params, after.opt_state),
    )
    assert any(jax.tree.leaves(moved)) == is_any_right


def test_a_step_whose_responses_are_all_filtered_moves_nothing():
    run = rl_toy.Run(rl_toy.options_of("", {"overlong.is_filtered": True})).take(2)
    table = np.full((rl_toy.NUM_TOKENS,) * 2, -20.0, np.float32)
    table[:, 2] = 20.0  # No response ends.
    run.state.params["logits"][...] = jnp.asarray(table)
    row = run.take(1).rows[-1]
    assert row["rollout/filtered_fraction"] == row["optim/empty_updates"] == 1
    np.testing.assert_array_equal(run.table, table)


def test_surplus_and_coefficient_are_saved_so_that_a_run_goes_on_bit_for_bit():
    changes = (
        changes_lib.REFILL_MORE
        | changes_lib.ADAPTED
        | changes_lib.BUFFER
        | {"train.num_minibatches": 2}
    )
    options = rl_toy.options_of("", changes)
    reference = rl_toy.first_table(seed=1)
    whole = rl_toy.Run(options, noise=0.2, reference=reference).take(2)
    assert whole.rows[1]["rollout/older_prompts_fraction"] > 0
    saved = json.loads(json.dumps(whole.feed.get_state()))
    table, opt_state = whole.table, jax.tree.map(np.array, whole.state.opt_state)
    surplus = len(whole.feed.carry.groups)
    whole.take(3)
    later = rl_toy.Run(options, noise=0.2, table=table, reference=reference)
    later.state = dataclasses.replace(later.state, step=later.state.step + 4, opt_state=opt_state)
    later.feed.set_state(saved)
    assert len(later.feed.carry.groups) == surplus
    later.rows = [{}, {}]
    later.take(3)
    np.testing.assert_array_equal(later.table, whole.table)
    names = [name for name in whole.rows[4] if not name.startswith("time/")]
    for row, expected in zip(later.rows[2:], whole.rows[2:], strict=True):
        assert [row.get(name) for name in names] == [expected.get(name) for name in names]


def test_some_step_of_that_run_begins_with_surplus():
    options = rl_toy.options_of("", changes_lib.REFILL_MORE)
    run = rl_toy.Run(options)
    sizes = []
    for _ in range(4):
        run.take(1)
        sizes.append(len(json.loads(json.dumps(run.feed.get_state()))["surplus"]))
    assert max(sizes) > 0


def test_a_saved_group_has_every_bit_of_its_responses():
    options = rl_toy.options_of("", changes_lib.REFILL_MORE)
    run = rl_toy.Run(options, noise=0.3)
    while not run.feed.carry.groups:
        run.take(1)
    for group in run.feed.carry.groups:
        again = rl_toy.decode(json.loads(json.dumps(rlvr_carry.encode(group))))
        assert (again.index, again.step) == (group.index, group.step)
        for one, other in zip(group.responses, again.responses, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.logprobs, other.logprobs)
            assert (one.segments, one.reward) == (other.segments, other.reward)
