"""Rows with shared prompts: to the expanded row and back, with the gradients of plain gathers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import inputs, shared


def _row(rng):
    """Return 7 tokens of prompts (two prompts and padding) and 9 behind them, in 40 places."""
    prompts, room, followers, places = [(0, 3), (3, 5)], 7, 9, 40
    source, owner = np.full((2, places), room + followers), np.full((2, places), room + followers)
    copies, behind = np.full((2, room, 3), places), np.full((2, followers), places)
    for row in range(2):
        at, offset, seen = 0, 0, {}
        for _ in range(3):
            number = int(rng.integers(2))
            start, stop = prompts[number]
            copy = at + np.arange(stop - start)
            source[row, copy] = np.arange(start, stop)
            if number not in seen:
                owner[row, copy] = np.arange(start, stop)
            copies[row, start:stop, seen.get(number, 0)] = copy
            seen[number] = seen.get(number, 0) + 1
            length = int(rng.integers(1, 4))
            own = at + stop - start + np.arange(length)
            source[row, own] = owner[row, own] = room + offset + np.arange(length)
            behind[row, offset : offset + length] = own
            at, offset = int(own[-1]) + 1, offset + length
    parts = (jnp.asarray(x, jnp.int32) for x in (source, owner, copies, behind))
    names = ("source", "owner", "copies", "followers")
    segments = inputs.Segments(ids=None, lengths=None, offsets=None)
    return shared.SharedPrompts(**dict(zip(names, parts, strict=True)), segments=segments)


def _gather(x, places):
    return jnp.take_along_axis(x, places[..., None, None], axis=1, mode="fill", fill_value=0)


@pytest.mark.parametrize("seed", range(4))
def test_gradients_of_keys_are_those_of_a_plain_gather(seed):
    rows = _row(np.random.default_rng(seed))
    x, cotangent = (
        jax.random.normal(jax.random.key(seed + n), (2, size, 2, 4))
        for n, size in ((0, 16), (9, 40))
    )
    found, back = jax.vjp(lambda x: shared.expand(x, rows, False), x)
    expected, plain = jax.vjp(lambda x: _gather(x, rows.source), x)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(back(cotangent)[0], plain(cotangent)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_read_back_from_queries_has_the_gradients_of_plain_gathers(seed):
    rows = _row(np.random.default_rng(seed))
    x = jax.random.normal(jax.random.key(seed), (2, 16, 2, 4))
    factor = jax.random.normal(jax.random.key(7), (2, 40, 1, 1))
    places = jnp.concatenate([rows.copies[..., 0], rows.followers], axis=1)

    def ours(x):
        return shared.collapse(jnp.sin(shared.expand(x, rows, True)) * factor, rows)

    def plain(x):
        return _gather(jnp.sin(_gather(x, rows.source)) * factor, places)

    cotangent = jax.random.normal(jax.random.key(8), (2, 16, 2, 4))
    for run in (ours, plain):
        out, back = jax.vjp(run, x)
        result = (out, back(cotangent)[0])
        if run is ours:
            expected = result
    for one, other in zip(expected, result, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
