"""Packing: which sequences stand in which row, epoch by epoch."""

import numpy as np
import pytest

from prism_jax import errors
from prism_jax.data import encode, packing


def _limits(**changes) -> packing.Limits:
    limits = {"tokens": 10, "patches": 100, "images": 100, "examples": 100}
    return packing.Limits(**(limits | changes))


def _sizes(*tokens: int, patches: int = 0, images: int = 0) -> np.ndarray:
    return np.array([(n, patches, images) for n in tokens], np.int64)


def test_the_largest_examples_choose_first_the_row_with_least_place_left():
    rows = packing.best_fit(_sizes(6, 7, 3, 2, 4), np.arange(5), _limits(), num_open_rows=4)
    # 7 and 6 open rows; 4 fits beside 6 alone, 3 beside 7; 2 has a row of its own.
    assert rows == [(0, 4), (1, 2), (3,)]
    rows = packing.best_fit(_sizes(5, 6, 2, 4), np.arange(4), _limits(), num_open_rows=4)
    # 4 goes beside 6, where it leaves nothing, not beside 5.
    assert rows == [(0, 2), (1, 3)]


def test_rows_that_are_not_full_are_filled_once_more_with_what_follows():
    # One row at a time: 6 alone is given up, and 4 joins it; 7 waits once and then stands alone.
    rows = packing.best_fit(_sizes(6, 4, 7, 8), np.arange(4), _limits(), num_open_rows=1)
    assert rows == [(0, 1), (2,), (3,)]


@pytest.mark.parametrize("num_open_rows", [1, 3, 50])
def test_every_example_stands_in_one_row_whatever_is_filled_at_a_time(num_open_rows):
    rng = np.random.default_rng(1)
    sizes = np.stack([rng.integers(1, 11, 300), rng.integers(0, 60, 300), rng.integers(0, 4, 300)])
    limits = _limits(images=6, examples=3)
    order = np.concatenate([rng.permutation(300), rng.permutation(300)[:40]])
    rows = packing.best_fit(sizes.T, order, limits, num_open_rows=num_open_rows)
    assert sorted(n for row in rows for n in row) == sorted(order.tolist())
    for row in rows:
        assert (sizes.T[list(row)].sum(0) <= [10, 100, 6]).all()
        assert len(row) <= 3


# Tokens of demonstrations (median, spread of the logarithm), patches a token of the prompt.
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("median", "spread"), [(700, 0.5), (1400, 0.6), (2200, 0.8)], ids=["short", "usual", "long"]
)
def test_rows_of_demonstrations_are_filled_to_97_percent(median, spread, seed):
    rng = np.random.default_rng(seed)
    tokens = np.clip(rng.lognormal(np.log(median), spread, 3000), 64, 8192).astype(int)
    patches = np.where(rng.random(3000) < 0.8, np.minimum(4 * (tokens // 3), 2304), 0)
    sizes = np.stack([tokens, patches, (patches > 0).astype(int)], -1)
    limits = packing.Limits(tokens=8192, patches=16_384, images=32, examples=32)
    rows = packing.best_fit(sizes, rng.permutation(3000), limits, num_open_rows=64)
    assert tokens.sum() / (len(rows) * 8192) >= 0.97
    # The order of lengths is not the order of training: early rows are no longer than late ones.
    longest = np.array([tokens[list(row)].max() for row in rows])
    half = len(rows) // 2
    assert abs(longest[:half].mean() / longest[half:].mean() - 1) < 0.2


@pytest.mark.parametrize(
    "limits",
    [_limits(patches=8), _limits(images=2), _limits(examples=2)],
    ids=["patches", "images", "examples"],
)
def test_every_kind_of_place_is_counted(limits):
    sizes = _sizes(1, 1, 1, patches=4, images=1)
    assert packing.best_fit(sizes, np.arange(3), limits, num_open_rows=4) == [(0, 1), (2,)]


def test_what_fits_no_row_says_by_how_much():
    assert _limits().misfit(encode.Size(tokens=10, patches=0, images=0)) is None
    told = _limits(patches=8).misfit(encode.Size(tokens=1, patches=12, images=1))
    assert told == "12 patches, the limit is 8"


def _plan(lengths=(7, 5), weights=(), *, seed=3, step_rows=2) -> packing.Plan:
    rng = np.random.default_rng(0)
    sizes = _sizes(*rng.integers(2, 8, sum(lengths)))
    return packing.Plan(
        sizes,
        lengths,
        weights,
        limits=_limits(),
        step_rows=step_rows,
        num_open_rows=4,
        seed=seed,
    )


def _examples(plan: packing.Plan, first: int, last: int) -> list[int]:
    return [n for step in range(first, last) for row in plan.step(step) for n in row]


def test_an_epoch_is_a_whole_number_of_steps_with_every_example_once():
    plan = _plan()
    end, second = plan.num_steps(1), plan.num_steps(2)
    assert sorted(_examples(plan, 0, end)) == list(range(12))
    assert sorted(_examples(plan, end, second)) == list(range(12))
    assert _examples(plan, 0, end) != _examples(plan, end, second)
    assert all(len(plan.step(step)) == 2 for step in range(second))


def test_a_step_is_the_same_whenever_it_is_asked_for():
    plan = _plan()
    forward = [plan.step(step) for step in range(20)]
    assert [plan.step(step) for step in range(19, -1, -1)] == forward[::-1]
    assert [_plan().step(step) for step in (19, 0, 7)] == [forward[19], forward[0], forward[7]]
    assert [_plan(seed=4).step(step) for step in range(20)] != forward


def test_a_step_does_not_depend_on_how_its_rows_are_split():
    assert _plan(step_rows=2).step(0) + _plan(step_rows=2).step(1) == _plan(step_rows=4).step(0)


def test_without_a_seed_the_examples_keep_their_order():
    order = packing.epoch_order((3, 2), (), seed=None, epoch=5)
    assert order.tolist() == [0, 1, 2, 3, 4]


def test_weights_share_out_an_epoch_and_each_source_goes_round_by_itself():
    drawn = [packing.epoch_order((8, 4), (1.0, 2.0), seed=1, epoch=e) for e in range(3)]
    for order in drawn:
        # Twelve places, a third of them for the eight examples of the first source.
        assert (order < 8).sum() == 4
        # Eight places for the four examples of the second: each twice.
        assert np.bincount(order[order >= 8] - 8).tolist() == [2, 2, 2, 2]
    first_two = np.concatenate(drawn[:2])
    assert sorted(first_two[first_two < 8]) == list(range(8))


def test_weights_must_be_positive_and_one_a_source():
    for weights in ((1.0,), (1.0, 0.0)):
        with pytest.raises(errors.InputError, match=r"data\.weights"):
            _plan(weights=weights)
