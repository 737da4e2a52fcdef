"""KL estimators on the recorded cases, the reward penalty by hand, the adaptive coefficient."""

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax.losses import kl


def test_every_oracle_case_gives_value_and_gradient_of_each_estimator(oracle):
    for case in oracle("kl.json"):
        logprobs, reference = (jnp.array(case[k]) for k in ("logprob", "reference_logprob"))
        assert set(case["expected"]) == set(kl.Estimator.__args__)
        for estimator, expected in case["expected"].items():
            value, pull = jax.vjp(
                lambda x, e=estimator, r=reference: kl.estimate(x, r, estimator=e), logprobs
            )
            close = {"rtol": 1e-5, "atol": 1e-5, "err_msg": estimator}
            np.testing.assert_allclose(value, expected["value"], **close)
            (gradient,) = pull(jnp.ones_like(value))
            np.testing.assert_allclose(gradient, expected["grad_logprob"], **close)


def test_expected_gradients_are_those_of_the_divergence_that_the_docstring_names():
    rng = np.random.default_rng(0)
    logits, reference = jnp.array(rng.normal(size=(2, 7)), jnp.float32)
    reference = jax.nn.log_softmax(reference)
    probabilities = jax.nn.softmax(logits)

    def expected(logits, estimator):
        # Over every token, the policy's probabilities held fixed: the mean over endless samples.
        values = kl.estimate(jax.nn.log_softmax(logits), reference, estimator=estimator)
        return (probabilities * values).sum()

    def forward(logits):
        logprobs = jax.nn.log_softmax(logits)
        return (jnp.exp(logprobs) * (logprobs - reference)).sum()

    def reverse(logits):
        return (jnp.exp(reference) * (reference - jax.nn.log_softmax(logits))).sum()

    of_divergence = {"k1": 0.0 * logits, "k2": jax.grad(forward)(logits)}
    of_divergence |= {"k3": jax.grad(reverse)(logits), "k3+": jax.grad(forward)(logits)}
    for estimator, wanted in of_divergence.items():
        gradient = jax.grad(expected)(logits, estimator)
        np.testing.assert_allclose(gradient, wanted, atol=1e-6, err_msg=estimator)
    assert np.abs(of_divergence["k2"] - of_divergence["k3"]).max() > 0.05
    for estimator in ("k1", "k3", "k3+"):
        np.testing.assert_allclose(expected(logits, estimator), forward(logits), rtol=1e-5)
    logprobs = jax.nn.log_softmax(logits)
    values = [kl.estimate(logprobs, reference, estimator=name) for name in ("k3", "k3+")]
    np.testing.assert_array_equal(*values)


def test_a_policy_equal_to_its_reference_is_pushed_by_k1_alone():
    logprobs = jnp.array([-1.5, 0.0])
    for estimator in kl.LossEstimator.__args__:
        value, pull = jax.vjp(
            lambda x, e=estimator: kl.estimate(x, logprobs, estimator=e), logprobs
        )
        (gradient,) = pull(jnp.ones_like(value))
        assert not value.any()
        np.testing.assert_array_equal(gradient, [float(estimator == "k1")] * 2)


def test_the_loss_ignores_masked_tokens_whatever_stands_there():
    logprobs = jnp.array([[-1.0, jnp.nan], [-2.0, -1.0]])
    reference = jnp.array([[-2.0, jnp.inf], [-2.0, -4.0]])
    mask = jnp.array([[True, False], [True, True]])

    def value(logprobs):
        term, _ = kl.loss(
            logprobs,
            reference,
            mask,
            estimator="k1",
            token_weights=None,
            aggregation="token-mean",
            norm_tokens=None,
        )
        return term.value

    loss, gradient = jax.value_and_grad(value)(logprobs)
    np.testing.assert_allclose(loss, (1 + 0 + 3) / 3, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.array([[1, 0], [1, 1]]) / 3, rtol=1e-6)


def test_the_reward_stands_on_the_last_token_and_the_penalty_on_each():
    rewards = jnp.array([1.0, 0.5, 2.0])
    logprobs = jnp.array([[-1.0, -1.0, -9.0], [-1.0, -2.0, -3.0], [0.0, 0.0, 0.0]])
    reference = jnp.array([[-2.0, -1.5, 0.0], [-1.0, -2.0, -2.0], [0.0, 0.0, 0.0]])
    mask = jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    token_rewards, mean_kl, _ = kl.penalised_rewards(
        rewards, logprobs, reference, mask, coefficient=0.1, estimator="k1"
    )
    expected = [[-0.1, 1 - 0.05, 0], [0, 0, 0.5 + 0.1], [0, 0, 0]]
    np.testing.assert_allclose(token_rewards, expected, rtol=1e-5, atol=1e-7)
    # Row means 0.75 and −1/3; the row without a token is not counted.
    np.testing.assert_allclose(mean_kl, (0.75 - 1 / 3) / 2, rtol=1e-5)


def test_a_coefficient_of_zero_leaves_the_reward():
    ones = jnp.ones((1, 4))
    token_rewards, _, _ = kl.penalised_rewards(
        jnp.array([0.7]), -ones, -2 * ones, ones > 0, coefficient=0.0, estimator="k3"
    )
    np.testing.assert_allclose(token_rewards, [[0, 0, 0, 0.7]], rtol=1e-6)


def test_the_coefficient_grows_above_the_target_and_shrinks_below_at_a_bounded_rate():
    options = {"num_rows": 100, "target": 0.1, "horizon": 1000.0}
    np.testing.assert_allclose(kl.adapt(0.5, 0.1, **options), 0.5, rtol=1e-6)
    np.testing.assert_allclose(kl.adapt(0.5, 0.11, **options), 0.5 * 1.01, rtol=1e-6)
    np.testing.assert_allclose(kl.adapt(0.5, 99.0, **options), 0.5 * 1.02, rtol=1e-6)
    np.testing.assert_allclose(kl.adapt(0.5, 0.0, **options), 0.5 * 0.98, rtol=1e-6)
