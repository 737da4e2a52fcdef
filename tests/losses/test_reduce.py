"""Aggregations by hand, and independence of how a batch is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax.losses import reduce

# Three rows of 1, 3 and 0 kept tokens; what is masked is large on purpose.
LOSSES = jnp.array([[4.0, 1e6, 1e6], [1.0, 2.0, 6.0], [jnp.inf, jnp.nan, 1e6]])
MASK = jnp.array([[1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
BY_HAND = {
    "token-mean": 13 / 4,
    "seq-mean-token-mean": (4 + 3) / 2,
    "seq-mean-token-sum": (4 + 9) / 2,
    "seq-mean-token-sum-norm": (4 + 9) / (2 * 10),
}
SPLITS = ([1, 3], [2, 2], [2, 1, 1])


def norm_tokens(aggregation):
    return 10 if aggregation == "seq-mean-token-sum-norm" else None


@pytest.mark.parametrize("aggregation", BY_HAND)
def test_aggregations_by_hand(aggregation):
    options = {"aggregation": aggregation, "norm_tokens": norm_tokens(aggregation)}
    term = reduce.aggregate(LOSSES, MASK, **options)
    np.testing.assert_allclose(term.value, BY_HAND[aggregation], rtol=1e-6)
    assert float(reduce.weight(MASK, **options)) == float(term.weight)


@pytest.mark.parametrize("aggregation", BY_HAND)
def test_any_split_into_microbatches_gives_the_same_loss_and_gradient(aggregation, share):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 7)), jnp.float32)
    parameter = jnp.asarray(rng.normal(size=7), jnp.float32)
    mask = jnp.arange(7) < jnp.array([1, 7, 0, 3])[:, None]
    options = {"aggregation": aggregation, "norm_tokens": norm_tokens(aggregation)}
    whole = {"term": reduce.weight(mask, **options)}

    def step(rows):
        def loss(parameter):
            losses = jnp.square(x[rows] * parameter)
            return share({"term": reduce.aggregate(losses, mask[rows], **options)}, whole)

        return jax.jit(jax.value_and_grad(loss))(parameter)

    expected = step(slice(0, 4))
    for sizes in SPLITS:
        ends = np.cumsum(sizes)
        parts = [step(slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
        got = jax.tree.map(lambda *leaves: sum(leaves), *parts)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


def test_weights_of_a_batch_with_a_microbatch_axis_are_those_of_its_rows():
    for aggregation in BY_HAND:
        options = {"aggregation": aggregation, "norm_tokens": norm_tokens(aggregation)}
        stacked = reduce.weight(MASK[:2].reshape(2, 1, 3), **options)
        assert float(stacked) == float(reduce.weight(MASK, **options))


def test_a_term_without_weight_is_zero_with_a_gradient_of_zero():
    def loss(x):
        return reduce.aggregate(
            x * LOSSES[:2], jnp.zeros((2, 3), bool), aggregation="token-mean", norm_tokens=None
        ).value

    assert jax.value_and_grad(loss)(2.0) == (0.0, 0.0)


def test_a_constant_length_is_required_where_it_is_used_and_refused_elsewhere():
    for aggregation, tokens in (("seq-mean-token-sum-norm", None), ("token-mean", 10)):
        with pytest.raises(ValueError, match="norm_tokens"):
            reduce.weight(MASK, aggregation=aggregation, norm_tokens=tokens)
