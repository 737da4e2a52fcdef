"""Policy losses: the recorded cases, equivalences between algorithms, and what a mask hides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax import metrics
from prism_jax.losses import policy

PLAIN = {"token_weights": None, "aggregation": "token-mean", "norm_tokens": None}
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def padded(cases, name, fill):
    """Pad one [B, T] field of every case to one shape: operations compile once for a file."""
    num_rows = max(len(case["mask"]) for case in cases)
    num_tokens = max(len(row) for case in cases for row in case["mask"])
    for case in cases:
        array = np.full((num_rows, num_tokens), fill, np.float32)
        array[: len(case[name]), : len(case[name][0])] = case[name]
        yield jnp.asarray(array)


def batch(shape=(3, 5)):
    rng = np.random.default_rng(0)
    logprobs = -np.abs(rng.normal(size=shape))
    old = logprobs + 0.3 * rng.normal(size=shape)
    advantages = rng.normal(size=(shape[0], 1))
    mask = np.arange(shape[1]) < 1 + 2 * np.arange(shape[0])[:, None]
    floats = (jnp.asarray(x, jnp.float32) for x in (logprobs, old, advantages))
    return *floats, jnp.asarray(mask)


def loss_and_gradient(function, logprobs, *args, **options):
    def loss(logprobs):
        term, logged = function(logprobs, *args, **options)
        return term.value, logged

    # Not jitted: the options differ from case to case, the shapes do not.
    (value, logged), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs)
    return float(value), np.asarray(gradient), metrics.read(logged)


def test_every_oracle_case_and_aggregation_gives_loss_gradient_and_metrics(oracle):
    cases = oracle("policy_loss.json")
    arrays = zip(
        padded(cases, "logprob", np.nan),
        padded(cases, "old_logprob", np.inf),
        padded(cases, "mask", 0),
        cases,
        strict=True,
    )
    for logprobs, old, mask, case in arrays:
        num_rows, num_tokens = np.shape(case["mask"])
        advantages = (
            jnp.zeros((mask.shape[0], 1)).at[:num_rows, 0].set(jnp.array(case["advantage"]))
        )
        for name, expected in case["expected"].items():
            ratio, aggregation = name.split("/")
            options = PLAIN | {
                "clip_low": case["clip_low"],
                "clip_high": case["clip_high"],
                "aggregation": aggregation,
            }
            if ratio == "clip_token":
                function, options = policy.ppo, options | {"dual_clip": case["dual_clip"]}
            else:
                assert ratio == "clip_sequence" and expected["dual_clip_fraction"] == 0
                function = policy.gspo
            loss, gradient, logged = loss_and_gradient(
                function, logprobs, old, advantages, mask > 0, **options
            )
            close = {"rtol": 1e-5, "atol": 1e-5, "err_msg": name}
            np.testing.assert_allclose(loss, expected["loss"], **close)
            np.testing.assert_allclose(
                gradient[:num_rows, :num_tokens], expected["grad_logprob"], **close
            )
            assert not gradient[num_rows:].any() and not gradient[:, num_tokens:].any()
            for quantity in ("clip_fraction", "approx_kl", "dual_clip_fraction"):
                # Without a token there is no metric, where the released code logs 0.
                is_absent = function is policy.gspo and quantity == "dual_clip_fraction"
                if is_absent or not mask.any():
                    assert f"policy/{quantity}" not in logged and expected[quantity] == 0
                else:
                    np.testing.assert_allclose(
                        logged[f"policy/{quantity}"], expected[quantity], **close
                    )


def test_gspo_equals_ppo_when_responses_have_one_token():
    logprobs, old, advantages, _ = batch(shape=(6, 1))
    mask = jnp.ones((6, 1), bool)
    got = loss_and_gradient(policy.gspo, logprobs, old, advantages, mask, **PLAIN, **CLIP)
    expected = loss_and_gradient(
        policy.ppo, logprobs, old, advantages, mask, dual_clip=None, **PLAIN, **CLIP
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-6)


def test_on_policy_all_algorithms_have_the_gradient_of_reinforce():
    logprobs, _, advantages, mask = batch()
    expected = loss_and_gradient(policy.reinforce, logprobs, advantages, mask, **PLAIN)[1]
    assert np.abs(expected).max() > 0.1
    for function, options in (
        (policy.ppo, {"dual_clip": 3.0}),
        (policy.gspo, {}),
        (policy.cispo, {}),
    ):
        _, gradient, logged = loss_and_gradient(
            function, logprobs, logprobs, advantages, mask, **PLAIN, **CLIP, **options
        )
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
        assert logged["policy/clip_fraction"] == 0


def test_cispo_keeps_the_gradient_of_a_clipped_token():
    # r = e, bound 1.28: gradient −1.28 · A; PPO's is 0 there.
    logprobs, old, advantages = jnp.array([[-1.0]]), jnp.array([[-2.0]]), jnp.array([[2.0]])
    mask = jnp.ones((1, 1), bool)
    _, gradient, logged = loss_and_gradient(
        policy.cispo, logprobs, old, advantages, mask, clip_low=None, clip_high=0.28, **PLAIN
    )
    np.testing.assert_allclose(gradient, [[-2.56]], rtol=1e-6)
    assert logged["policy/clip_fraction"] == 1
    _, gradient, _ = loss_and_gradient(
        policy.ppo, logprobs, old, advantages, mask, dual_clip=None, **PLAIN, **CLIP
    )
    assert gradient == 0


def test_cispo_has_a_lower_bound_only_when_given():
    logprobs, old, advantages = jnp.array([[-2.0]]), jnp.array([[-1.0]]), jnp.array([[1.0]])
    mask = jnp.ones((1, 1), bool)
    for clip_low, factor in ((None, np.exp(-1.0)), (0.2, 0.8)):
        _, gradient, _ = loss_and_gradient(
            policy.cispo, logprobs, old, advantages, mask, clip_low=clip_low, clip_high=1.0, **PLAIN
        )
        np.testing.assert_allclose(gradient, [[-factor]], rtol=1e-6)


def test_the_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely():
    logprobs, old, advantages = jnp.array([[-1.0]]), jnp.array([[-4.0]]), jnp.array([[-1.0]])
    mask = jnp.ones((1, 1), bool)
    for dual_clip, loss in ((None, np.exp(3.0)), (10.0, 10.0)):
        value, gradient, logged = loss_and_gradient(
            policy.ppo, logprobs, old, advantages, mask, dual_clip=dual_clip, **PLAIN, **CLIP
        )
        np.testing.assert_allclose(value, loss, rtol=1e-5)
        assert (gradient == 0).all() == (dual_clip is not None)
        assert ("policy/dual_clip_fraction" in logged) == (dual_clip is not None)


def test_an_advantage_for_each_token_and_one_for_the_response_agree():
    logprobs, old, advantages, mask = batch()
    each = jnp.broadcast_to(advantages, mask.shape)
    for function, options in (
        (policy.ppo, {"dual_clip": 3.0}),
        (policy.gspo, {}),
        (policy.cispo, {}),
    ):
        got, expected = (
            loss_and_gradient(function, logprobs, old, a, mask, **PLAIN, **CLIP, **options)
            for a in (each, advantages)
        )
        np.testing.assert_allclose(got[1], expected[1], rtol=1e-6)


def test_token_weights_scale_totals_and_not_denominators():
    logprobs, old, advantages, mask = batch()
    weights = jnp.zeros(mask.shape).at[1].set(0.5)
    options = dict(dual_clip=None, aggregation="token-mean", norm_tokens=None, **CLIP)
    term, _ = policy.ppo(logprobs, old, advantages, mask, token_weights=weights, **options)
    alone, _ = policy.ppo(
        logprobs,
        old,
        advantages,
        mask.at[0].set(False).at[2].set(False),
        token_weights=None,
        **options,
    )
    np.testing.assert_allclose(term.total, 0.5 * alone.total, rtol=1e-6)
    assert float(term.weight) == float(mask.sum())


def test_a_filtered_row_counts_nowhere():
    logprobs, old, advantages, mask = batch()
    options = dict(dual_clip=3.0, token_weights=None, norm_tokens=None, **CLIP)
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        filtered, _ = policy.ppo(
            logprobs, old, advantages, mask.at[1].set(False), aggregation=aggregation, **options
        )
        rows = jnp.array([0, 2])
        removed, _ = policy.ppo(
            logprobs[rows],
            old[rows],
            advantages[rows],
            mask[rows],
            aggregation=aggregation,
            **options,
        )
        np.testing.assert_allclose(filtered.value, removed.value, rtol=1e-6)


def test_a_dual_clip_that_would_cut_good_tokens_is_refused():
    with pytest.raises(ValueError, match="dual_clip"):
        policy.ppo(*batch(), dual_clip=1.0, **PLAIN, **CLIP)
