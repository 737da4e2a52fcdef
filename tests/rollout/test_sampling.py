"""Drawing tokens: the filters and the distribution."""

import functools

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
    many = [settings] * num_draws
    tokens, logprobs = sampling.draw(rows, keys, sampling.Settings.of(many), sampling.Mode.of(many))
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


def test_rows_with_different_settings_draw_what_they_draw_alone():
    logits = jax.random.normal(jax.random.key(1), (5, 40)) * 2
    keys = jax.random.split(jax.random.key(2), 5)
    usual = {"max_tokens": 1, "end_token_ids": ()}
    rows = [
        sampling.Sampling(temperature=0.0, top_k=3, top_p=0.1, **usual),
        sampling.Sampling(temperature=0.7, top_k=None, top_p=None, **usual),
        sampling.Sampling(temperature=1.3, top_k=5, top_p=None, **usual),
        sampling.Sampling(temperature=1.0, top_k=None, top_p=0.6, **usual),
        sampling.Sampling(temperature=1.0, top_k=2, top_p=0.9, **usual),
    ]
    together = sampling.draw(logits, keys, sampling.Settings.of(rows), sampling.Mode.of(rows))
    for row, settings in enumerate(rows):
        one = slice(row, row + 1)
        alone = sampling.draw(
            logits[one], keys[one], sampling.Settings.of([settings]), sampling.Mode.of([settings])
        )
        assert int(alone[0][0]) == int(together[0][row])
        np.testing.assert_allclose(alone[1][0], together[1][row], atol=1e-6)


def test_only_top_p_below_1_sorts():
    def primitives(**changes):
        usual = {"temperature": 1.0, "top_k": None, "top_p": None}
        one = sampling.Sampling(**(usual | changes), max_tokens=1, end_token_ids=())
        run = functools.partial(sampling.draw, mode=sampling.Mode.of([one]))
        keys = jax.random.split(jax.random.key(0), 1)
        return str(jax.make_jaxpr(run)(jnp.zeros((1, 9)), keys, sampling.Settings.of([one])))

    assert " sort[" not in primitives(top_p=1.0)
    assert " sort[" not in primitives(top_k=3)
    assert "random_bits" not in primitives(temperature=0.0, top_p=0.5)
    assert " sort[" in primitives(top_p=0.5)


@pytest.mark.parametrize(
    ("setting", "value"), [("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)]
)
def test_settings_outside_their_range_raise(setting, value):
    with pytest.raises(ValueError, match=f"sampling.{setting}"):
        _draw([0.0, 1.0], **{setting: value})
