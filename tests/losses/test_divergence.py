"""The chunked divergences equal the naive ones in values and gradients, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prism_jax.losses import divergence

_CASES = [("forward", None), ("reverse", None), ("jsd", 0.5), ("jsd", 0.1)]
# The teacher is wider than the policy.
T, D, F, V = 13, 8, 12, 37


def _inputs(num_tokens=T, vocab=V, dtype=np.float32):
    rng = np.random.default_rng(7)
    shapes = ((num_tokens, D), (vocab, D), (num_tokens, F), (vocab, F), (num_tokens,))
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _chunked(*arguments):
    *arrays, kind, share, temperature, chunk_tokens = arguments
    return divergence.weighted_divergences(
        *arrays,
        divergence=kind,
        teacher_share=share,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )


def _naive(hidden, head, teacher_hidden, teacher_head, weights, kind, share, temperature):
    """Compute the weighted sum and the divergences from the full distributions."""
    p = jax.nn.softmax(hidden @ head.T / temperature)
    q = jax.nn.softmax(teacher_hidden @ teacher_head.T / temperature)

    def kl(a, b):
        return (a * jnp.log(a / b)).sum(-1)

    if kind == "jsd":
        m = share * q + (1 - share) * p
        values = share * kl(q, m) + (1 - share) * kl(p, m)
    else:
        values = kl(q, p) if kind == "forward" else kl(p, q)
    return (weights * values).sum(), values


@pytest.mark.parametrize(("kind", "share"), _CASES)
@pytest.mark.parametrize(("chunk_tokens", "temperature"), [(4, 0.7), (64, 1.0)])
def test_values_and_gradients_equal_the_naive_ones_in_float64(
    kind, share, chunk_tokens, temperature
):
    arrays = _inputs()

    def of(function, arrays):
        def loss(*arrays):
            total, values = function(*arrays)
            return 3.0 * total, (total, values)

        (_, found), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*arrays)
        return *found, *gradients

    got = of(lambda *x: _chunked(*x, kind, share, temperature, chunk_tokens), arrays)
    with jax.enable_x64(True):
        wide = [x.astype(np.float64) for x in arrays]
        expected = of(lambda *x: _naive(*x, kind, share, temperature), wide)
        assert expected[2].dtype == np.float64
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # Without differentiation the same function takes the path without gradients.
    total, values = _chunked(*arrays, kind, share, temperature, chunk_tokens)
    np.testing.assert_allclose(total, got[0], rtol=1e-5)
    assert (np.asarray(values) > 0).all()


def test_the_teacher_gets_no_gradient_and_an_equal_one_pulls_nowhere():
    hidden, head, _, _, weights = _inputs()
    for kind, share in _CASES:

        def loss(hidden, head, teacher, kind=kind, share=share):
            return _chunked(hidden, head, *teacher, weights, kind, share, 0.9, 4)[0]

        same = (hidden, head)
        own, of_head, of_teacher = jax.grad(loss, argnums=(0, 1, 2))(hidden, head, same)
        assert not any(np.any(x) for x in of_teacher)
        np.testing.assert_allclose(own, 0, atol=1e-5)
        np.testing.assert_allclose(of_head, 0, atol=1e-5)


def test_distributions_far_apart_stay_finite_in_bfloat16():
    hidden, head, teacher_hidden, teacher_head, weights = _inputs()
    narrow = [jnp.asarray(30 * x, jnp.bfloat16) for x in (hidden, teacher_hidden)]
    for kind, share in _CASES:

        def loss(hidden, head, kind=kind, share=share):
            return _chunked(hidden, head, narrow[1], teacher_head, weights, kind, share, 1.0, 4)

        (total, values), pull = jax.vjp(loss, narrow[0], head)
        gradients = pull((jnp.ones(()), jnp.zeros(T)))
        assert np.isfinite(total) and np.isfinite(values).all()
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in gradients)
        assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.float32]


def test_no_array_has_the_tokens_and_the_vocabulary():
    arrays = _inputs(num_tokens=64, vocab=96)
    for kind, share in _CASES:
        gradient = jax.grad(lambda *x, k=kind, s=share: _chunked(*x, k, s, 1.0, 16)[0], (0, 1))
        assert "64,96" not in str(jax.make_jaxpr(gradient)(*arrays))


def test_temporary_memory_is_at_most_a_quarter_of_the_naive_one():
    shapes = [(4096, D), (16384, D), (4096, F), (16384, F), (4096,)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def temporary(function):
        compiled = jax.jit(jax.grad(function, argnums=(0, 1))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = temporary(lambda *x: _naive(*x, "reverse", None, 1.0)[0])
    assert temporary(lambda *x: _chunked(*x, "reverse", None, 1.0, 256)[0]) <= whole / 4


@pytest.mark.parametrize(("tokens", "vocabulary"), [("data", None), ("data", "tensor")])
def test_eight_devices_equal_one_with_tokens_or_vocabulary_sharded(tokens, vocabulary):
    arrays = _inputs(num_tokens=64, vocab=48)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    places = (tokens, vocabulary, tokens, vocabulary, tokens)
    placed = [
        jax.device_put(x, NamedSharding(mesh, PartitionSpec(place)))
        for x, place in zip(arrays, places, strict=True)
    ]
    step = jax.jit(
        jax.value_and_grad(lambda *x: _chunked(*x, "jsd", 0.3, 0.8, 16)[0], argnums=(0, 1))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        step(*placed),
        step(*arrays),
    )


def test_a_share_belongs_to_jsd_alone():
    arrays = _inputs()
    for kind, share in (("jsd", None), ("reverse", 0.5)):
        with pytest.raises(ValueError, match="teacher_share must be given for jsd alone"):
            _chunked(*arrays, kind, share, 1.0, 4)
