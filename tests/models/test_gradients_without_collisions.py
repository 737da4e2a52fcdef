"""Gradients of look-ups equal those of plain indexing, and no place adds what is nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import deepstack, layers, vision

KEY = jax.random.key(0)


def _gradient(function, table, *, like):
    out, pull = jax.vjp(function, table)
    return out, pull(jax.random.normal(KEY, like, out.dtype))[0]


@pytest.mark.parametrize("places", [1, 12, 2048, 1025])
def test_looking_up_has_the_values_and_the_gradient_of_indexing(places):
    table = jax.random.normal(KEY, (7, 5))
    rows = jax.random.randint(KEY, (3, places), 0, 7)
    like = (3, places, 5)
    out, gradient = _gradient(lambda t: layers.look_up(t, rows), table, like=like)
    expected_out, expected = _gradient(lambda t: t[rows], table, like=like)
    np.testing.assert_array_equal(out, expected_out)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_equal_rows_are_summed_in_float32():
    # In bfloat16 256 + 1 is 256: added one by one the sum would stay there.
    rows = jnp.zeros((1, 1000), jnp.int32)
    _, pull = jax.vjp(lambda t: layers.look_up(t, rows), jnp.zeros((2, 1), jnp.bfloat16))
    np.testing.assert_array_equal(pull(jnp.ones((1, 1000, 1), jnp.bfloat16))[0], [[1000.0], [0.0]])


def test_interpolating_has_the_values_and_the_gradient_of_indexing():
    table = jax.random.normal(KEY, (9, 5))
    corners = jax.random.randint(KEY, (2, 8, 4), 0, 9)
    weights = jax.random.uniform(KEY, (2, 8, 4))
    like = (2, 8, 5)

    def plain(t):
        return jnp.einsum("bpcd,bpc->bpd", t[corners], weights, precision="highest")

    out, gradient = _gradient(lambda t: vision.interpolate(t, corners, weights), table, like=like)
    expected_out, expected = _gradient(plain, table, like=like)
    np.testing.assert_allclose(out, expected_out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_text_gets_zeros_and_adds_nothing_not_even_nan_to_the_pictures():
    tokens = jax.random.normal(KEY, (1, 3, 2))
    slots = jnp.array([[-1, 0, 2, -1, 1, -1]])
    out, pull = jax.vjp(lambda t: deepstack.place(t, slots), tokens)
    expected = np.zeros((6, 2), np.float32)
    expected[[1, 2, 4]] = tokens[0, [0, 2, 1]]
    np.testing.assert_array_equal(out[0], expected)
    d_out = jnp.where(slots[..., None] < 0, jnp.nan, jnp.arange(6.0)[:, None])
    np.testing.assert_array_equal(pull(d_out * jnp.ones((1, 6, 2)))[0][0], [[1, 1], [4, 4], [2, 2]])
