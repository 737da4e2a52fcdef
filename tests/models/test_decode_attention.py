"""Decoding's attention: exact lengths, shared prompts, and the kernels against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention, decode_attention, decode_kernel, sharding
from models.cache import Cache, Layout, Prompts

_HEADS, _KV_HEADS, _SIZE = 4, 2, 8


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _cache(lengths, prompts, *, places=6, classes=((4, 1),)) -> Cache:
    layout = Layout(classes)
    shape = (len(layout.rows), _KV_HEADS, places, _SIZE)
    return Cache(
        keys=_normal(10, *shape),
        values=_normal(20, *shape),
        layout=layout,
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


def _places(blocks: jax.Array, first: int, count: int) -> jax.Array:
    """Return the first `count` places [K, count, H] of blocks from a first one."""
    size = blocks.shape[2]
    return jnp.concatenate(blocks[first : first + -(-count // size)], axis=1)[:, :count]


# Prompts of one block and of two, the second of some prompts empty; rows of one block and of three,
# which end inside the first, with the second, and in the last.
@pytest.mark.parametrize(
    ("places", "classes", "prompt_places"),
    [(6, ((4, 1),), 5), (3, ((3, 2), (1, 3)), 3), (9, ((3, 1), (1, 1)), 3)],
)
def test_a_row_reads_its_prompt_and_its_own_places_as_one_sequence(places, classes, prompt_places):
    # Prompt 1 is continued by rows 3 and 0.
    num_blocks = -(-5 // prompt_places)
    prompts = Prompts(
        keys=_normal(30, 3 * num_blocks, _KV_HEADS, prompt_places, _SIZE),
        values=_normal(31, 3 * num_blocks, _KV_HEADS, prompt_places, _SIZE),
        lengths=jnp.array([2, 5, 4], jnp.int32),
        readers=jnp.array([[1, -1], [3, 0], [-1, 2]], jnp.int32),
        number=jnp.array([1, 0, 2, 1], jnp.int32),
        place=jnp.array([1, 0, 1, 0], jnp.int32),
    )
    lengths = [3, 0, 5, 5 if places == 6 else 8]
    cache = _cache(lengths, prompts, places=places, classes=classes)
    (q, k, v), mixed, keys, values = _attend(cache)
    for row, length in enumerate(lengths):
        # The token itself stands behind the places in use.
        prompt, first = int(prompts.number[row]), int(cache.layout.first[row])
        used = int(prompts.lengths[prompt])
        own = [_places(x, first, length + 1) for x in (keys, values)]
        for found, new in zip(own, (k, v), strict=True):
            np.testing.assert_array_equal(found[:, length], new[row, 0])
        before = _places(cache.keys, first, length + 1)[:, :length]
        np.testing.assert_array_equal(own[0][:, :length], before)
        read = [_places(x, prompt * num_blocks, used) for x in (prompts.keys, prompts.values)]
        whole = [jnp.concatenate(both, axis=1) for both in zip(read, own, strict=True)]
        mask = jnp.ones((1, 1, used + length + 1), bool)
        expected = attention._masked_softmax(
            q[row : row + 1], *(x.swapaxes(0, 1)[None] for x in whole), mask
        )
        np.testing.assert_allclose(mixed[row], expected[0], atol=1e-6)


def test_a_full_row_is_not_overwritten():
    cache = _cache([6, 2, 0, 5], None, places=3, classes=((4, 2),))
    _, _, keys, _ = _attend(cache)
    changed = (keys != cache.keys).any(axis=(1, 2, 3))
    # The first row's two blocks are full; the others' tokens stand in the first or the second.
    assert changed.tolist() == [False, False, True, False, True, False, False, True]


def test_a_row_that_does_not_run_reads_one_place():
    cache = _cache([3, 2, 4, 5], None)
    # NaN where only a row that runs would read.
    poisoned = cache.values.at[1, :, 1:].set(jnp.nan)
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


# One row a core and both cores; a block that is full, rows of one place, and rows of none: the
# first and the last of a core, one between others, and all of a core.
@pytest.mark.parametrize(
    ("lengths", "queries"),
    [
        ([1, 700, 512, 1024], 4),
        ([513, 1, 3], 16),
        ([0, 700, 0, 1024, 3, 0], 4),
        ([700, 0, 513, 0, 0, 0], 4),
    ],
)
def test_the_tpu_kernel_equals_the_masked_softmax(lengths, queries):
    q = _normal(1, len(lengths), 2, queries, 128)
    k, v = (_normal(seed, len(lengths), 2, 1024, 128) for seed in (2, 3))
    lengths = jnp.array(lengths, jnp.int32)
    run = jax.jit(functools.partial(decode_kernel.part, interpret=True))
    found = run(q, k, v, lengths)
    expected = decode_attention.part(q, k, v, lengths, implementation="xla")
    is_read = np.asarray(lengths) > 0
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[is_read], theirs[is_read], atol=2e-6)
    assert not np.asarray(found[0])[~is_read].any()
    assert (np.asarray(found[1])[~is_read] == -np.inf).all()


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
