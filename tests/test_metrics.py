"""Reducers merge as their type says, and what was never counted has no value."""

import jax
import jax.numpy as jnp

from prism_jax import metrics


def test_a_mean_over_unequal_parts_is_the_mean_of_the_whole():
    values = jnp.array([1.0, 2.0, 6.0, 100.0])
    mask = jnp.array([True, True, True, False])
    whole = metrics.Mean.of(values, mask)
    parts = metrics.Mean.of(values[:1], mask[:1]).merge(metrics.Mean.of(values[1:], mask[1:]))
    assert float(whole.value) == float(parts.value) == 3.0


def test_sum_max_and_min_merge_by_their_own_rule():
    mask = jnp.array([True, False])
    first, second = jnp.array([3.0, 99.0]), jnp.array([-2.0, -99.0])
    assert float(metrics.Sum.of(first, mask).merge(metrics.Sum.of(second, mask)).value) == 1.0
    assert float(metrics.Max.of(first, mask).merge(metrics.Max.of(second, mask)).value) == 3.0
    assert float(metrics.Min.of(first, mask).merge(metrics.Min.of(second, mask)).value) == -2.0


def test_what_was_never_counted_is_absent():
    values, nothing = jnp.array([0.92]), jnp.array([False])
    told = {
        "a/mean": metrics.Mean.of(values, nothing),
        "a/max": metrics.Max.of(values, nothing),
        "a/min": metrics.Min.of(values, nothing),
        "a/sum": metrics.Sum.of(values, nothing),
    }
    assert metrics.read(told) == {"a/sum": 0.0}


def test_values_that_are_not_finite_do_not_leak_through_the_mask():
    values, mask = jnp.array([1.0, jnp.nan, jnp.inf]), jnp.array([True, False, False])
    assert float(metrics.Mean.of(values, mask).value) == 1.0
    assert float(metrics.Sum.of(values, mask).value) == 1.0
    assert float(metrics.Max.of(values, mask).value) == 1.0
    assert float(metrics.Min.of(values, mask).value) == 1.0


def test_reducers_pass_through_jit():
    told = jax.jit(lambda x: {"a/mean": metrics.Mean.of(x, x > 1)})(jnp.array([1.0, 2.0, 4.0]))
    assert metrics.read(told) == {"a/mean": 3.0}
