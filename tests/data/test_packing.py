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


def test_an_example_goes_into_the_first_open_row_that_has_place():
    rows = packing.first_fit(_sizes(6, 7, 3, 2, 4), np.arange(5), _limits(), num_open_rows=4)
    # 6 and 3 fill nine of the first row's ten places, 7 and 2 nine of the second's; 4 fits neither.
    assert rows == [(0, 2), (1, 3), (4,)]


def test_the_oldest_open_row_is_closed_for_a_new_one():
    # With one open row the 4 of number 2 can no longer join number 0.
    rows = packing.first_fit(_sizes(6, 7, 4), np.arange(3), _limits(), num_open_rows=1)
    assert rows == [(0,), (1,), (2,)]
    rows = packing.first_fit(_sizes(6, 7, 4), np.arange(3), _limits(), num_open_rows=2)
    assert rows == [(0, 2), (1,)]


@pytest.mark.parametrize(
    "limits",
    [_limits(patches=8), _limits(images=2), _limits(examples=2)],
    ids=["patches", "images", "examples"],
)
def test_every_kind_of_place_is_counted(limits):
    sizes = _sizes(1, 1, 1, patches=4, images=1)
    assert packing.first_fit(sizes, np.arange(3), limits, num_open_rows=4) == [(0, 1), (2,)]


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
