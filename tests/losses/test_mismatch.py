"""The mismatch of sampler and trainer: metrics and weights by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax import metrics
from prism_jax.losses import mismatch

TRAINER = jnp.log(jnp.array([[0.4, 0.1, 0.9], [0.2, 0.5, 0.5]]))
SAMPLER = jnp.log(jnp.array([[0.1, 0.2, 0.1], [0.4, 0.5, 0.25]]))
MASK = jnp.array([[1, 1, 0], [1, 1, 1]], bool)


def test_token_and_sequence_ratios_by_hand():
    token = mismatch.ratios(TRAINER, SAMPLER, MASK, level="token")
    np.testing.assert_allclose(token, [[4, 0.5, 1], [0.5, 1, 2]], rtol=1e-5)
    sequence = mismatch.ratios(TRAINER, SAMPLER, MASK, level="sequence")
    np.testing.assert_allclose(sequence, [[2, 2, 1], [1, 1, 1]], rtol=1e-5)


def test_truncation_bounds_above_and_masking_drops_on_both_sides():
    ratio = jnp.array([[4.0, 0.1, 1.5]])
    np.testing.assert_allclose(mismatch.truncated_weights(ratio, high=2.0), [[2, 0.1, 1.5]])
    np.testing.assert_allclose(mismatch.masked_weights(ratio, low=0.5, high=2.0), [[0, 0, 1.5]])


def test_ratios_carry_no_gradient():
    def total(trainer):
        return mismatch.ratios(trainer, SAMPLER, MASK, level="token").sum()

    assert not jax.grad(total)(TRAINER).any()


def test_metrics_by_hand_and_zero_for_equal_logprobs():
    logged = metrics.read(mismatch.measure(TRAINER, SAMPLER, MASK, None))
    distances = np.log([4, 2, 2, 1, 2])
    ratios = np.array([4, 0.5, 0.5, 1, 2])
    np.testing.assert_allclose(
        logged["policy/sampler_logprob_difference_mean"], distances.mean(), rtol=1e-5
    )
    largest = logged["policy/sampler_logprob_difference_max"]
    np.testing.assert_allclose(largest, np.log(4), rtol=1e-5)
    np.testing.assert_allclose(
        logged["policy/sampler_kl"], (ratios - 1 - np.log(ratios)).mean(), rtol=1e-5
    )
    same = metrics.read(mismatch.measure(TRAINER, TRAINER, MASK, None))
    assert set(same.values()) == {0.0}


def test_metrics_tell_what_the_weights_did():
    weights = jnp.array([[0.0, 1.0, 9.0], [2.0, 1.0, 1.0]])
    logged = metrics.read(mismatch.measure(TRAINER, SAMPLER, MASK, weights))
    assert logged["policy/sampler_weight_mean"] == 1.0
    np.testing.assert_allclose(logged["policy/sampler_weight_zero_fraction"], 0.2, rtol=1e-6)


def test_an_unknown_level_is_refused():
    with pytest.raises(Exception, match="level"):
        mismatch.ratios(TRAINER, SAMPLER, MASK, level="group")
