"""Each implementation of attention on the same cases, forward and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention, cudnn_attention, inputs, sharding
from prism_jax import mesh as mesh_lib

# rows of 256 places: lengths of the segments; query heads, kv heads, head size; causal.
_CASES = {
    "text_grouped_queries": ([[100, 28, 90], [256]], (4, 2, 32), True),
    "text_one_kv_head": ([[1, 254], [7, 8, 9]], (4, 1, 16), True),
    "vision_head_64": ([[64, 128, 16], [200]], (2, 2, 64), False),
    "vision_head_72": ([[36, 220], [4, 4, 4]], (2, 2, 72), False),
}


def _reference(q, k, v, ids, *, causal):
    """Attend in float64, one query at a time; padding gets zeros."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            for t in np.flatnonzero(ids[b]):
                seen = ids[b] == ids[b, t]
                if causal:
                    seen &= np.arange(len(seen)) <= t
                logits = k[b, seen, n // group] @ q[b, t, n] / np.sqrt(q.shape[-1])
                weights = np.exp(logits - logits.max())
                out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


def _arrays(name: str):
    rows, (n, k, h), causal = _CASES[name]
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, 256, heads, h) for heads in (n, k, k, n)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    segments = inputs.pack_segments(rows, row_length=256, max_segments=4)
    segments = jax.tree.map(jnp.asarray, segments)
    return arrays[:3], arrays[3], segments, causal


def _xla(q, k, v, segments, causal):
    return attention.attend(
        q,
        k,
        v,
        segments,
        causal=causal,
        implementation="xla",
        rules=sharding.REPLICATED,
        row_axis="batch",
    )


@pytest.mark.parametrize("name", _CASES)
def test_xla_equals_attention_written_out(name):
    (q, k, v), _, segments, causal = _arrays(name)
    expected = _reference(q, k, v, segments.ids, causal=causal)
    np.testing.assert_allclose(_xla(q, k, v, segments, causal), expected, atol=1e-5)


@pytest.mark.parametrize("name", _CASES)
def test_splash_equals_xla_with_gradients(name):
    qkv, cotangent, segments, causal = _arrays(name)

    def gradients(run):
        out, back = jax.vjp(run, *qkv)
        return out, *back(cotangent)

    expected = gradients(lambda *a: _xla(*a, segments, causal))
    is_token = (segments.ids > 0)[..., None, None]

    def splash(*qkv):
        out = attention.splash(*qkv, segments, causal=causal, interpret=True)
        return jnp.where(is_token, out, 0)

    found = gradients(splash)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("name", ["text_grouped_queries", "vision_head_72"])
def test_queries_on_several_devices_read_whole_rows_in_the_kernel(name):
    qkv, cotangent, segments, causal = _arrays(name)
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES)

    def gradients(run):
        out, back = jax.vjp(run, *qkv)
        return out, *back(cotangent)

    def by_length(*qkv):
        out = attention._by_length(
            *qkv, segments,
            causal=causal, implementation="splash",
            rules=rules, row_axis="batch", interpret=True,
        )  # fmt: skip
        return jnp.where((segments.ids > 0)[..., None, None], out, 0)

    expected = gradients(lambda *a: _xla(*a, segments, causal))
    with jax.set_mesh(mesh_lib.make({"data": 2, "sequence": 2, "tensor": 2})):
        found = jax.jit(lambda: gradients(by_length))()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("name", _CASES)
def test_places_that_cudnn_leaves_unwritten_spoil_neither_results_nor_gradients(name, monkeypatch):
    qkv, cotangent, segments, causal = _arrays(name)
    is_padding = (segments.ids == 0)[..., None, None]

    @jax.custom_vjp
    def unwritten(x):
        return jnp.where(is_padding, jnp.nan, x)

    def backward(_, cotangent):
        return (jnp.where(is_padding, jnp.nan, cotangent),)

    unwritten.defvjp(lambda x: (unwritten(x), None), backward)

    def packed(q, k, v, segments, *, causal):
        q, k, v = (unwritten(x) for x in (q, k, v))
        clean = [jnp.where(is_padding, 0, x) for x in (q, k, v)]
        return jnp.where(is_padding, jnp.nan, attention._xla(*clean, segments.ids, causal=causal))

    monkeypatch.setattr(cudnn_attention, "packed", packed)
    monkeypatch.setattr(cudnn_attention, "check", lambda q: None)

    def run(implementation):
        def attend(q, k, v):
            return attention.attend(
                q, k, v, segments,
                causal=causal, implementation=implementation,
                rules=sharding.REPLICATED, row_axis="batch",
            )  # fmt: skip

        out, back = jax.vjp(attend, *qkv)
        return out, *back(cotangent)

    for ours, theirs in zip(run("cudnn"), run("xla"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_blocks_of_queries_equal_one_block(monkeypatch):
    (q, k, v), _, segments, causal = _arrays("text_grouped_queries")
    whole = _xla(q, k, v, segments, causal)
    monkeypatch.setattr(attention, "_BLOCK", 64)
    np.testing.assert_allclose(_xla(q, k, v, segments, causal), whole, atol=1e-6)


@pytest.mark.parametrize("places", [4352, 16_640])
def test_long_rows_of_any_size_need_memory_for_a_block_of_queries_only(places):
    shape = jax.ShapeDtypeStruct((1, places, 4, 64), jnp.float32)
    segments = inputs.Segments(
        ids=jax.ShapeDtypeStruct((1, places), jnp.int32), lengths=None, offsets=None
    )
    run = jax.jit(lambda q, k, v, segments: _xla(q, k, v, segments, causal=False))
    memory = run.lower(shape, shape, shape, segments).compile().memory_analysis()
    whole = 4 * places * places * 4  # float32 logits of every pair of places, 4 heads
    assert memory.temp_size_in_bytes < 0.3 * whole


def test_combinations_that_are_not_supported_raise():
    (q, k, v), _, segments, _ = _arrays("text_grouped_queries")

    def attend(implementation, dtype=jnp.float32, length=256):
        part = [x[:, :length].astype(dtype) for x in (q, k, v)]
        return attention.attend(
            *part,
            inputs.pack_segments([[4], [5]], row_length=length, max_segments=4),
            causal=True,
            implementation=implementation,
            rules=sharding.REPLICATED,
            row_axis="batch",
        )

    with pytest.raises(NotImplementedError, match="bfloat16"):
        attend("cudnn")
    with pytest.raises(NotImplementedError, match="multiple of 128"):
        attend("splash", length=100)
    if jax.__version_info__ < (0, 11):
        with pytest.raises(NotImplementedError, match=r"JAX 0\.11"):
            attend("cudnn", jnp.bfloat16)
    assert segments.ids.shape == (2, 256)
