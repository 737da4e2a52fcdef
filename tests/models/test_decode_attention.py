"""Decoding's attention: exact lengths, shared prompts, and the kernels against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention, decode_attention, decode_kernel, sharding
from models.cache import Cache, Prompts

_HEADS, _KV_HEADS, _SIZE = 4, 2, 8


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _cache(lengths, prompts, sizes=((4, 6),)) -> Cache:
    def places(seed):
        return tuple(
            _normal(seed + n, rows, _KV_HEADS, length, _SIZE)
            for n, (rows, length) in enumerate(sizes)
        )

    return Cache(
        keys=places(10),
        values=places(20),
        lengths=jnp.array(lengths, jnp.int32),
        next_positions=jnp.zeros(len(lengths), jnp.int32),
        is_running=None,
        prompts=prompts,
    )


def _attend(cache: Cache):
    rows = cache.lengths.shape[0]
    q, k, v = (
        _normal(seed, rows, 1, heads, _SIZE)
        for seed, heads in ((1, _HEADS), (2, _KV_HEADS), (3, _KV_HEADS))
    )
    mixed, keys, values = decode_attention.attend(
        q, k, v, cache, implementation="xla", rules=sharding.REPLICATED
    )
    return (q, k, v), mixed, keys, values


def test_a_row_reads_its_prompt_and_its_own_places_as_one_sequence():
    # Rows 0 to 2 have six places, row 3 has nine; prompt 1 is continued by rows 3 and 0.
    prompts = Prompts(
        keys=_normal(30, 3, _KV_HEADS, 5, _SIZE),
        values=_normal(31, 3, _KV_HEADS, 5, _SIZE),
        lengths=jnp.array([2, 5, 4], jnp.int32),
        readers=jnp.array([[1, -1], [3, 0], [-1, 2]], jnp.int32),
        number=jnp.array([1, 0, 2, 1], jnp.int32),
        place=jnp.array([1, 0, 1, 0], jnp.int32),
    )
    lengths = [3, 0, 5, 8]
    (q, k, v), mixed, keys, values = _attend(_cache(lengths, prompts, ((3, 6), (1, 9))))
    for row, length in enumerate(lengths):
        size, at = (0, row) if row < 3 else (1, 0)
        prompt = int(prompts.number[row])
        used = int(prompts.lengths[prompt])
        # The token itself stands behind the places in use.
        np.testing.assert_array_equal(keys[size][at, :, length], k[row, 0])
        np.testing.assert_array_equal(values[size][at, :, length], v[row, 0])
        whole = [
            jnp.concatenate([a[prompt, :, :used], b[size][at, :, : length + 1]], axis=1)
            for a, b in ((prompts.keys, keys), (prompts.values, values))
        ]
        total = used + length + 1
        mask = jnp.ones((1, 1, total), bool)
        expected = attention._masked_softmax(
            q[row : row + 1], *(x.swapaxes(0, 1)[None] for x in whole), mask
        )
        np.testing.assert_allclose(mixed[row], expected[0], atol=1e-6)


def test_a_full_row_is_not_overwritten():
    cache = _cache([6, 2, 0, 5], None)
    _, _, keys, _ = _attend(cache)
    np.testing.assert_array_equal(keys[0][0], cache.keys[0][0])
    assert (keys[0][1] != cache.keys[0][1]).any()


def test_a_row_that_does_not_run_reads_one_place():
    cache = _cache([3, 2, 4, 5], None)
    # NaN where only a row that runs would read.
    poisoned = tuple(x.at[1, :, 1:].set(jnp.nan) for x in cache.values)
    cache = dataclasses.replace(
        cache, values=poisoned, is_running=jnp.array([True, False, True, True])
    )
    used = []
    usual = decode_attention.part

    def part(q, k, v, lengths, *, implementation):
        used.append(np.asarray(lengths))
        return usual(q, k, v, lengths, implementation=implementation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_attention, "part", part)
        _attend(cache)
    assert used[0].tolist() == [4, 1, 5, 6]


# One row a core and both cores; a block that is full, and rows of one place.
@pytest.mark.parametrize(("lengths", "queries"), [([1, 700, 512, 1024], 4), ([513, 1, 3], 16)])
def test_the_tpu_kernel_equals_the_masked_softmax(lengths, queries):
    q = _normal(1, len(lengths), 2, queries, 128)
    k, v = (_normal(seed, len(lengths), 2, 1024, 128) for seed in (2, 3))
    lengths = jnp.array(lengths, jnp.int32)
    run = jax.jit(functools.partial(decode_kernel.part, interpret=True))
    found = run(q, k, v, lengths)
    expected = decode_attention.part(q, k, v, lengths, implementation="xla")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_the_tpu_kernel_reads_no_block_behind_a_row_s_length():
    q, k, v = (_normal(seed, 2, 1, size, 128) for seed, size in ((1, 4), (2, 1024), (3, 1024)))
    lengths = jnp.array([512, 30], jnp.int32)
    run = jax.jit(functools.partial(decode_kernel.part, interpret=True))
    poisoned = [x.at[:, :, 512:].set(jnp.nan) for x in (k, v)]
    np.testing.assert_array_equal(run(q, *poisoned, lengths)[0], run(q, k, v, lengths)[0])


def test_what_a_kernel_does_not_take_raises():
    q = _normal(1, 1, 1, 4, 8)
    k = _normal(2, 1, 1, 100, 8)
    lengths = jnp.ones(1, jnp.int32)
    for implementation, told in (
        ("cudnn", "bfloat16"),
        ("pallas", "multiple of 128"),
    ):
        with pytest.raises(NotImplementedError, match=told):
            decode_attention.part(q, k, k, lengths, implementation=implementation)
