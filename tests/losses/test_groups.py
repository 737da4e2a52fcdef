"""Scales of scores by hand, and what each keeps of the distances."""

import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax.losses import advantage, groups

_SCORES = np.float32([1.0, 2.0, 4.0, -3.0, 5.0, 5.01, 5.02, 5.03])
_VALID = np.array([1, 1, 1, 0, 1, 1, 1, 1], bool)
_GROUP = np.repeat(np.int32([0, 1]), 4)
_TEACHER = np.repeat(np.float32([6.0, 5.5]), 4)


def _arrays(*arrays):
    return [jnp.asarray(x) for x in arrays]


def _scaled(kind, floor=None):
    scale = groups.Scale(kind=kind, floor=floor)
    rows = _arrays(_SCORES, _VALID, _GROUP, _TEACHER)
    found = groups.scaled(*rows, num_groups=2, eps=1e-6, scale=scale)
    return np.asarray(found, np.float64)


def _centred():
    rows = _SCORES.reshape(2, 4).astype(np.float64)
    return (rows - rows.mean(1, keepdims=True)).ravel()


def test_the_groups_own_scale_is_the_released_one_to_the_last_bit():
    plain = advantage.group_normalise(*_arrays(_SCORES, _GROUP), num_groups=2, eps=1e-6)
    np.testing.assert_array_equal(_scaled("group"), np.asarray(plain, np.float64))


def test_a_floor_keeps_a_group_small_whose_scores_hardly_differ():
    found, plain = _scaled("group", floor=0.5), _scaled("group")
    np.testing.assert_array_equal(found[:4], plain[:4])
    assert np.abs(plain[4:]).max() > 1
    np.testing.assert_allclose(found[4:], _centred()[4:] / 0.5, rtol=1e-3)


def test_the_steps_scale_is_the_deviation_of_valid_rows_within_their_groups():
    first, second = _SCORES[:3].astype(np.float64), _SCORES[4:].astype(np.float64)
    squares = ((first - first.mean()) ** 2).sum() + ((second - second.mean()) ** 2).sum()
    np.testing.assert_allclose(_scaled("step"), _centred() / np.sqrt(squares / 5), rtol=1e-3)


def test_the_teachers_scale_says_how_far_below_the_teacher_a_group_is():
    distances = (_SCORES - _TEACHER).astype(np.float64)
    expected = distances / np.sqrt((distances[_VALID] ** 2).mean())
    np.testing.assert_allclose(_scaled("teacher"), expected, rtol=1e-4)
    assert _scaled("teacher")[:3].mean() < 4 * _scaled("teacher")[4:].mean() < 0


def test_without_a_scale_the_distances_stay():
    np.testing.assert_allclose(_scaled("none"), _centred(), atol=1e-5)


def test_parts_of_a_reward_have_advantages_that_add_up_to_the_wholes():
    part = np.float32([1, 0, 0, 1, 0, 1, 0, 0])
    shared = {"num_groups": 2, "eps": 1e-6}
    one, rest = (
        advantage.grpo_part(*_arrays(x, _SCORES, _GROUP), **shared) for x in (part, _SCORES - part)
    )
    whole = advantage.grpo(*_arrays(_SCORES, _GROUP), **shared)
    np.testing.assert_allclose(np.asarray(one) + np.asarray(rest), np.asarray(whole), atol=1e-3)


@pytest.mark.parametrize("kind", ["group", "step", "teacher", "none"])
def test_equal_scores_have_no_advantage_over_each_other(kind):
    scale = groups.Scale(kind=kind, floor=None)
    same = np.full(8, 0.7, np.float32)
    found = groups.scaled(*_arrays(same, _VALID, _GROUP, same), num_groups=2, eps=1e-6, scale=scale)
    np.testing.assert_array_equal(np.asarray(found), np.zeros(8))
