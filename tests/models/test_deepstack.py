"""Merged tokens at their places: text reads zeros, and its gradient is added nowhere."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import deepstack

_NUM_TOKENS = 3
# Two groups of two rows; most places are text or padding, one picture's token stands twice.
_SLOTS = np.array(
    [[-1, 0, 2, -1, -1], [1, -1, -1, -1, -1], [-1, -1, 2, 2, -1], [-1, -1, -1, -1, 0]], np.int32
)
_PICTURES = {(0, 0): 1, (0, 1): 1, (0, 2): 1, (1, 0): 1, (1, 2): 2}


def _plain(tokens: jax.Array, slots: jax.Array) -> jax.Array:
    """Return what `place` does: text reads token 0, and what it read is replaced."""
    groups = tokens.shape[0]
    flat = slots.reshape(groups, -1)
    found = tokens[jnp.arange(groups)[:, None], jnp.maximum(flat, 0)]
    return jnp.where(flat[..., None] >= 0, found, 0).reshape(*slots.shape, -1)


def _tokens(groups: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (groups, _NUM_TOKENS, 4))


def _additions(place, slots: jax.Array, groups: int) -> dict[tuple[int, int], int]:
    """Return how many places the gradient adds to each token, by group and token."""
    # Without jit the scatter is an operation of the gradient itself, and what it knows of the
    # slots a constant.
    with jax.disable_jit():
        out, pull = jax.vjp(lambda tokens: place(tokens, slots), _tokens(groups))
        traced = jax.make_jaxpr(pull)(out)
    known = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
    (scatter,) = [op for op in traced.eqns if op.primitive.name == "scatter-add"]
    token = np.asarray(known[scatter.invars[1]])[..., -1].reshape(groups, -1)
    group = np.broadcast_to(np.arange(groups)[:, None], token.shape)
    is_inside = (token >= 0) & (token < _NUM_TOKENS)
    places = zip(group[is_inside].tolist(), token[is_inside].tolist(), strict=True)
    return collections.Counter(places)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_values_and_gradients_are_those_of_a_plain_gather(groups):
    tokens, slots = _tokens(groups), jnp.asarray(_SLOTS)
    out, pull = jax.vjp(lambda t: deepstack.place(t, slots), tokens)
    expected, expected_pull = jax.vjp(lambda t: _plain(t, slots), tokens)
    np.testing.assert_array_equal(out, expected)
    d_out = jax.random.normal(jax.random.key(1), out.shape)
    np.testing.assert_allclose(pull(d_out)[0], expected_pull(d_out)[0], rtol=1e-6)


def test_the_gradient_of_text_is_added_to_no_token():
    slots = jnp.asarray(_SLOTS)
    assert _additions(deepstack.place, slots, 2) == _PICTURES
    # The plain gather adds the zeros of all seven and eight places of text to the first token.
    crowded = _PICTURES | {(0, 0): 1 + 7, (1, 0): 1 + 7}
    assert _additions(_plain, slots, 2) == crowded


def test_a_row_without_pictures_adds_nothing():
    slots = jnp.full((2, 5), -1, jnp.int32)
    assert not _additions(deepstack.place, slots, 1)
    np.testing.assert_array_equal(deepstack.place(_tokens(1), slots), np.zeros((2, 5, 4)))
