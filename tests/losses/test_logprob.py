"""The chunked head equals the whole one in values and gradients, on less memory, on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prism_jax.losses import logprob

T, D, V = 13, 8, 37


def whole(hidden, head, targets, temperature):
    """Compute log-probs and entropies from the full logits."""
    logits = jnp.einsum("td,vd->tv", hidden, head, preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(logits / temperature)
    picked = jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
    return picked, -(jnp.exp(log_p) * log_p).sum(-1)


def inputs(num_tokens=T, dim=D, vocab=V, dtype=jnp.float32):
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(num_tokens, dim)), dtype)
    head = jnp.asarray(rng.normal(size=(vocab, dim)), dtype)
    targets = jnp.asarray(rng.integers(0, vocab, num_tokens), jnp.int32)
    return hidden, head, targets, jnp.asarray(rng.normal(size=(2, num_tokens)), jnp.float32)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def chunked(hidden, head, targets, temperature, chunk_tokens, with_entropy=True):
    return logprob.token_logprobs(
        hidden,
        head,
        targets,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        with_entropy=with_entropy,
    )


@pytest.mark.parametrize("chunk_tokens, temperature", [(1, 1.0), (4, 0.7), (13, 1.0), (64, 0.7)])
def test_values_and_gradients_equal_the_whole_head(chunk_tokens, temperature):
    hidden, head, targets, pulls = inputs()

    def loss(function, hidden, head):
        logprobs, entropy = function(hidden, head)
        return (pulls[0] * logprobs).sum() + (pulls[1] * entropy).sum(), (logprobs, entropy)

    def of(function):
        grad = jax.value_and_grad(loss, argnums=(1, 2), has_aux=True)
        return jax.jit(grad, static_argnums=0)(function, hidden, head)

    got = of(lambda h, w: chunked(h, w, targets, temperature, chunk_tokens))
    expected = of(lambda h, w: whole(h, w, targets, temperature))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_the_log_prob_gradient_does_not_need_the_entropy():
    hidden, head, targets, pulls = inputs()
    logprobs, entropy = chunked(hidden, head, targets, 1.0, 4, with_entropy=False)
    assert entropy is None

    def of(with_entropy):
        return jax.grad(
            lambda h: (pulls[0] * chunked(h, head, targets, 1.0, 4, with_entropy)[0]).sum()
        )(hidden)

    np.testing.assert_allclose(of(False), of(True), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logprobs, whole(hidden, head, targets, 1.0)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [5, 64])
def test_gradients_made_in_the_forward_pass_are_the_same(chunk_tokens):
    hidden, head, targets, pulls = inputs()
    weights = pulls[0]

    def fused(hidden, head):
        total, logprobs = logprob.weighted_logprobs(
            hidden, head, targets, weights, temperature=0.9, chunk_tokens=chunk_tokens
        )
        return 3.0 * total, (total, logprobs)

    def plain(hidden, head):
        logprobs, _ = whole(hidden, head, targets, 0.9)
        total = (weights * logprobs).sum()
        return 3.0 * total, (total, logprobs)

    got, expected = (
        jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(hidden, head) for f in (fused, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)
    # Without differentiation the same function takes the path without gradients.
    np.testing.assert_allclose(fused(hidden, head)[1][0], got[0][1][0], rtol=1e-5)


def test_bfloat16_operands_give_float32_logprobs_near_those_of_float32():
    hidden, head, targets, _ = inputs(num_tokens=64, dtype=jnp.bfloat16)
    logprobs, entropy = chunked(hidden, head, targets, 1.0, 16)
    expected = whole(hidden.astype(jnp.float32), head.astype(jnp.float32), targets, 1.0)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    # Products of bfloat16 numbers are exact in float32: only the order of sums may differ.
    np.testing.assert_allclose(logprobs, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dtype", [jnp.bfloat16, jnp.float32])
def test_gradients_come_in_the_dtype_of_what_they_belong_to(head_dtype):
    hidden, head, targets, _ = inputs()
    hidden, head = hidden.astype(jnp.bfloat16), head.astype(head_dtype)
    gradients = jax.grad(lambda h, w: chunked(h, w, targets, 1.0, 4)[0].sum(), argnums=(0, 1))(
        hidden, head
    )
    assert [g.dtype for g in gradients] == [jnp.bfloat16, head_dtype]


def test_the_head_gradient_is_summed_over_chunks_in_float32():
    # 4096 equal tokens in chunks of 1: a bfloat16 sum of equal addends stops growing at 256.
    num_tokens = 4096
    hidden = jnp.ones((num_tokens, 2), jnp.bfloat16)
    head = jnp.zeros((4, 2), jnp.float32)
    targets = jnp.zeros((num_tokens,), jnp.int32)
    gradient = jax.grad(lambda w: chunked(hidden, w, targets, 1.0, 1)[0].sum())(head)
    expected = num_tokens * np.array([0.75, -0.25, -0.25, -0.25])[:, None] * np.ones((1, 2))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_large_logits_stay_finite():
    hidden, head, targets, _ = inputs()
    logprobs, entropy = chunked(1e4 * hidden, head, targets, 1.0, 4)
    gradient = jax.grad(lambda h: chunked(1e4 * h, head, targets, 1.0, 4)[1].sum())(hidden)
    assert np.isfinite(logprobs).all() and np.isfinite(entropy).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("with_entropy", [False, True])
def test_temporary_memory_is_at_most_three_tenths_of_the_whole_head(with_entropy):
    shapes = (
        jax.ShapeDtypeStruct((4096, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((16384, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((4096,), jnp.int32),
    )

    def temporary(function):
        def loss(hidden, head, targets):
            logprobs, entropy = function(hidden, head, targets)
            return logprobs.sum() + (entropy.sum() if with_entropy else 0.0)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    naive = temporary(lambda h, w, t: whole(h, w, t, 1.0))
    assert naive >= 4096 * 16384 * 4
    assert temporary(lambda h, w, t: chunked(h, w, t, 1.0, 512, with_entropy)) <= 0.30 * naive


def test_no_array_has_the_tokens_and_the_vocabulary():
    hidden, head, targets, _ = inputs(num_tokens=64, vocab=96)

    def loss(hidden, head):
        logprobs, entropy = chunked(hidden, head, targets, 1.0, 16)
        return (logprobs + entropy).sum()

    assert "64,96" not in str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, head))


@pytest.mark.parametrize(
    "hidden_axes, head_axes",
    [
        (("data", None), (None, None)),
        (("data", None), ("tensor", None)),
        ((None, "tensor"), (None, "tensor")),
        (("data", "tensor"), ("tensor", "data")),
    ],
)
def test_eight_devices_equal_one_with_tokens_width_or_vocabulary_sharded(hidden_axes, head_axes):
    hidden, head, targets, pulls = inputs(num_tokens=64, vocab=48)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def place(x, axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def loss(hidden, head, targets, pulls):
        logprobs, entropy = chunked(hidden, head, targets, 0.8, 16)
        return (pulls[0] * logprobs + pulls[1] * entropy).sum()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    expected = step(hidden, head, targets, pulls)
    got = step(place(hidden, hidden_axes), place(head, head_axes), targets, pulls)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_sharded_tokens_stay_sharded_inside_every_chunk():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shapes = inputs(num_tokens=1024, dim=16, vocab=512)[:3]
    placed = [
        jax.device_put(x, NamedSharding(mesh, PartitionSpec(axes)))
        for x, axes in zip(shapes, ("data", None, "data"), strict=True)
    ]

    def flops(arrays):
        function = jax.jit(lambda *a: chunked(*a, 1.0, 256, with_entropy=False)[0])
        return function.lower(*arrays).compile().cost_analysis()["flops"]

    assert flops(placed) < 0.2 * flops(shapes)


def test_a_temperature_or_a_chunk_of_zero_is_refused():
    hidden, head, targets, _ = inputs()
    with pytest.raises(ValueError, match="temperature"):
        chunked(hidden, head, targets, 0.0, 4)
    with pytest.raises(ValueError, match="chunk_tokens"):
        chunked(hidden, head, targets, 1.0, 0)
