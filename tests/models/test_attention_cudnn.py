"""cuDNN attention on an NVIDIA GPU against the masked softmax in float32."""

import functools

import jax
import jax.numpy as jnp
import pytest

from models import attention, decode_attention, inputs, sharding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

# Lengths of the segments a row of 1024 places, static segments; query heads, kv heads, head size.
_CASES = {
    "text_grouped_queries": ([[400, 113, 300], [1024], [1, 2, 700]], 6, (32, 8, 128), True),
    "text_mostly_padding": ([[40, 9], [], [1000]], 8, (32, 8, 128), True),
    "text_one_kv_head": ([[7, 900], [512, 512], [1000]], 4, (8, 1, 64), True),
    "vision_head_64": ([[256, 512, 64], [900], [4, 4, 4, 4]], 8, (16, 16, 64), False),
    "vision_head_72": ([[36, 220, 700], [1024], [8]], 8, (16, 16, 72), False),
}


def _norm_error(found, expected) -> float:
    found, expected = (jnp.ravel(x.astype(jnp.float32)) for x in (found, expected))
    assert bool(jnp.isfinite(found).all())
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def _arrays(heads: tuple[int, int, int], rows: int = 3):
    n, k, h = heads
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, 1024, count, h) for count in (n, k, k, n)]
    return [
        jax.random.normal(key, shape).astype(jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ]


@pytest.mark.parametrize("name", _CASES)
def test_packed_rows_equal_the_masked_softmax_with_gradients(name):
    rows, max_segments, heads, causal = _CASES[name]
    q, k, v, cotangent = _arrays(heads)
    segments = inputs.pack_segments(rows, row_length=1024, max_segments=max_segments)
    segments = jax.tree.map(jnp.asarray, segments)

    def run(implementation, dtype):
        def attend(q, k, v):
            return attention.attend(
                q,
                k,
                v,
                segments,
                causal=causal,
                implementation=implementation,
                rules=sharding.REPLICATED,
                row_axis="batch",
            )

        @jax.jit
        def with_gradients(q, k, v, cotangent):
            out, back = jax.vjp(attend, q, k, v)
            return out, *back(cotangent)

        with jax.default_matmul_precision("highest"):
            return with_gradients(*(x.astype(dtype) for x in (q, k, v, cotangent)))

    found = run("cudnn", jnp.bfloat16)
    expected = run("xla", jnp.float32)
    for what, ours, theirs in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert _norm_error(ours, theirs) < 6e-3, what


# A response's own queries of a kv head, and those of sixteen readers of a prompt.
@pytest.mark.parametrize("queries", [4, 64])
def test_decoding_and_its_log_sum_exp_equal_the_masked_softmax(queries):
    keys = jax.random.split(jax.random.key(1), 3)
    sizes = (queries, 1024, 1024)
    q, k, v = (
        jax.random.normal(key, (3, 8, size, 128)).astype(jnp.bfloat16)
        for key, size in zip(keys, sizes, strict=True)
    )
    lengths = jnp.array([1, 700, 1024], jnp.int32)

    def run(implementation, dtype):
        part = functools.partial(decode_attention.part, implementation=implementation)
        with jax.default_matmul_precision("highest"):
            return jax.jit(part)(*(x.astype(dtype) for x in (q, k, v)), lengths)

    found, expected = run("cudnn", jnp.bfloat16), run("xla", jnp.float32)
    assert _norm_error(found[0], expected[0]) < 6e-3
    assert found[1].dtype == jnp.float32
    assert float(jnp.abs(found[1] - expected[1]).max()) < 1e-3
