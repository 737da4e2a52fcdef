"""Drawing tokens: the filters and the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax.rollout import sampling


def _draw(logits, num_draws=1, seed=0, **changes):
    usual = {"temperature": 1.0, "top_k": None, "top_p": None}
    settings = sampling.Sampling(**(usual | changes), max_tokens=1, end_token_ids=())
    rows = jnp.tile(jnp.asarray(logits, jnp.float32)[None], (num_draws, 1))
    keys = jax.random.split(jax.random.key(seed), num_draws)
    tokens, logprobs = sampling.draw(rows, keys, settings)
    return np.asarray(tokens), np.asarray(logprobs)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature):
    logits = np.array([1.0, 0.0, -1.0, 2.0])
    tokens, logprobs = _draw(logits, 20_000, temperature=temperature)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    found = np.bincount(tokens, minlength=4) / len(tokens)
    # Four standard deviations of a share over 20 000 draws are below 0.015.
    np.testing.assert_allclose(found, expected, atol=0.015)
    np.testing.assert_allclose(np.exp(logprobs), expected[tokens], rtol=1e-5)


def test_top_k_keeps_the_likeliest():
    tokens, _ = _draw([0.1, 0.4, 0.3, 0.2], 500, top_k=2)
    assert set(tokens) == {1, 2}


# Probabilities 0.5, 0.3, 0.15, 0.05: the fewest likeliest that reach p.
@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, {0}), (0.5, {0}), (0.6, {0, 1}), (0.8, {0, 1}), (0.9, {0, 1, 2})]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    tokens, logprobs = _draw(np.log([0.5, 0.3, 0.15, 0.05]), 2000, top_p=top_p - 1e-4)
    assert set(tokens) == kept
    # The log-probability is the one before the filter.
    assert logprobs.min() >= np.log(0.15) - 1e-5
    assert np.isclose(logprobs.max(), np.log(0.5))


def test_temperature_0_takes_the_most_likely_and_tells_its_probability():
    tokens, logprobs = _draw([0.0, 3.0, 1.0], temperature=0.0)
    assert tokens.tolist() == [1]
    assert np.isclose(logprobs[0], 3 - np.log(1 + np.e**3 + np.e))


@pytest.mark.parametrize(
    ("setting", "value"), [("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)]
)
def test_settings_outside_their_range_raise(setting, value):
    with pytest.raises(ValueError, match=f"sampling.{setting}"):
        _draw([0.0, 1.0], **{setting: value})
