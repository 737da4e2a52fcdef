"""The supervised loss: which token predicts which, and the same step for any split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax import metrics
from prism_jax.losses import sft


def test_targets_are_the_next_assistant_tokens_of_the_same_segment():
    tokens = jnp.array([[10, 11, 12, 13, 20, 21, 22, 0]])
    segment_ids = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    is_assistant = jnp.array([[0, 1, 1, 1, 0, 1, 1, 0]], bool)
    targets, mask = sft.next_token_targets(tokens, segment_ids, is_assistant)
    np.testing.assert_array_equal(targets, [[11, 12, 13, 20, 21, 22, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0, 1, 1, 0, 0]])


def test_a_segment_that_opens_with_an_assistant_token_is_not_predicted_from_its_neighbour():
    ones = jnp.ones((1, 4), bool)
    _, mask = sft.next_token_targets(jnp.array([[1, 2, 3, 4]]), jnp.array([[1, 1, 2, 2]]), ones)
    np.testing.assert_array_equal(mask, [[1, 0, 1, 0]])


def inputs():
    rng = np.random.default_rng(5)
    hidden = jnp.asarray(rng.normal(size=(4, 6, 8)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(19, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 19, (4, 6)), jnp.int32)
    return hidden, head, targets, jnp.arange(6) < jnp.array([1, 6, 0, 4])[:, None]


@pytest.mark.parametrize("implementation", ["recompute", "fused"])
def test_the_loss_is_the_mean_over_unmasked_targets(implementation):
    hidden, head, targets, mask = inputs()
    log_p = jax.nn.log_softmax(hidden @ head.T)
    picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    term, logged = sft.nll(
        hidden, head, targets, mask, chunk_tokens=5, implementation=implementation
    )
    np.testing.assert_allclose(term.value, -np.asarray(picked)[np.asarray(mask)].mean(), rtol=1e-5)
    assert metrics.read(logged) == {"loss/nll": float(term.value), "data/target_tokens": 11.0}


@pytest.mark.parametrize("implementation", ["recompute", "fused"])
def test_any_split_into_microbatches_gives_the_same_gradient(implementation, share):
    hidden, head, targets, mask = inputs()
    whole = {"nll": mask.sum(dtype=jnp.float32)}

    def step(rows):
        def loss(head):
            term, _ = sft.nll(
                hidden[rows],
                head,
                targets[rows],
                mask[rows],
                chunk_tokens=4,
                implementation=implementation,
            )
            return share({"nll": term}, whole)

        return jax.jit(jax.value_and_grad(loss))(head)

    def plain(head):
        log_p = jax.nn.log_softmax(hidden @ head.T)
        picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return -jnp.where(mask, picked, 0.0).sum() / mask.sum()

    expected = jax.jit(jax.value_and_grad(plain))(head)
    for ends in ([4], [1, 4]):
        parts = [step(slice(a, b)) for a, b in zip([0, *ends], ends, strict=False)]
        got = jax.tree.map(lambda *leaves: sum(leaves), *parts)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected
        )
