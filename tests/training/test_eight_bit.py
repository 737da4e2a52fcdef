"""Moments in 8 bits: their error and their mean; `test_optim_kinds` trains with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax.training import eight_bit


def _moments(seed: int, *, has_sign: bool):
    """Return rows whose numbers lie five decades apart or more; the third row is 0."""
    keys = jax.random.split(jax.random.key(seed), 2)
    decades = jax.random.uniform(keys[1], (5, 600), minval=-5, maxval=0)
    x = jax.random.normal(keys[0], (5, 600)) * 10.0**decades
    x = x.at[2].set(0.0)
    return x if has_sign else x**2


def _steps(x, sizes, *, has_sign):
    """Return how far the two codes beside each number are apart, at most.

    (c / 127)² has the slope 2 √v / 127, ((c + 1) / 256)⁴ has 4 v^¾ / 256; the second term is the
    distance of the lowest codes.
    """
    x, sizes = (np.asarray(array, np.float64) for array in (x, sizes))
    sizes = np.repeat(sizes, eight_bit.BLOCK, axis=-1)[..., : x.shape[-1]]
    share = np.abs(x) / np.where(sizes > 0, sizes, 1)
    slope = 2 * share**0.5 / 127 if has_sign else 4 * share**0.75 / 256
    return sizes * (1.1 * slope + (2 / 127**2 if has_sign else 15 / 256**4))


@pytest.mark.parametrize("has_sign", [True, False])
def test_a_number_becomes_the_nearest_code_and_stays_it(has_sign):
    encode = jax.jit(functools.partial(eight_bit.encode, has_sign=has_sign, key=None))
    x = _moments(0, has_sign=has_sign)
    blocks = encode(x)
    assert blocks.codes.dtype == (jnp.int8 if has_sign else jnp.uint8)
    assert blocks.codes.shape == x.shape
    assert blocks.sizes.shape == (5, 3)  # 600 numbers are two blocks and a part
    found = np.asarray(eight_bit.decode(blocks))
    steps = _steps(x, blocks.sizes, has_sign=has_sign)
    assert (np.abs(found - x) <= 0.5 * steps).all()
    largest = np.abs(x).reshape(5, -1).argmax(-1)
    rows = np.arange(5)
    np.testing.assert_array_equal(found[rows, largest], np.asarray(x)[rows, largest])
    np.testing.assert_array_equal(found[2], 0)
    if not has_sign:
        assert (np.delete(found, 2, axis=0) > 0).all()
    again = encode(found)
    np.testing.assert_array_equal(again.codes, blocks.codes)
    np.testing.assert_array_equal(again.sizes, blocks.sizes)


@pytest.mark.parametrize("has_sign", [True, False])
def test_stochastic_rounding_keeps_the_mean(has_sign):
    x = _moments(1, has_sign=has_sign)[:2, :256]
    keys = jax.random.split(jax.random.key(2), 4000)
    encode = functools.partial(eight_bit.encode, x, has_sign=has_sign)
    drawn = jax.lax.map(lambda key: eight_bit.decode(encode(key=key)), keys)
    drawn, sizes = np.asarray(drawn, np.float64), encode(key=None).sizes
    # A draw deviates by half a step at most, the mean of 4000 by a 126th; the nearest by half.
    steps = _steps(x, sizes, has_sign=has_sign)
    lowest = 0 if has_sign else np.asarray(sizes) / 256**4  # below it there is no code
    assert (np.abs(drawn.mean(0) - np.asarray(x)) <= 5 / 126 * steps + lowest).all()
