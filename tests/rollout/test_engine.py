"""The sampler against the model's full forward, on tiny models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import attention, inputs, sharding
from prism_jax import mesh as mesh_lib
from prism_jax.rollout import decode, engine, serving
from prism_jax.rollout.sampling import Sampling
from tests.models import cases, ours

_PROMPTS = [*cases.ROWS["rows_of_different_length"], *cases.ROWS["a_video"]]


@functools.cache
def _engine(case: str, axes: tuple = ()) -> tuple[engine.Engine, nnx.State]:
    graphdef, params = ours.model(case)
    config = nnx.merge(graphdef, params).config
    mesh, rules = None, sharding.REPLICATED
    if axes:
        mesh, rules = mesh_lib.make(dict(axes)), mesh_lib.rules(mesh_lib.DEFAULT_RULES)
        params = jax.device_put(params, mesh_lib.param_shardings(params, mesh, rules))
    graphdef, params = serving.prepare(graphdef, params, dtype=jnp.float32, donate=False)
    built = engine.Engine(
        graphdef=graphdef,
        config=config,
        shapes=engine.Shapes(prompt_tokens=16, row_patches=64, row_images=4),
        prefill_implementation="xla",
        decode_implementation="xla",
        chunk_tokens=64,
        mesh=mesh,
        rules=rules,
    )
    return built, params


def _sampling(**changes) -> Sampling:
    usual = {"temperature": 1.0, "top_k": None, "top_p": None, "max_tokens": 12}
    return Sampling(**(usual | {"end_token_ids": (5, 6)} | changes))


def _generate(case="dense_tied_2_levels_head64", *, axes=(), prompts=_PROMPTS, seed=0, **options):
    built, params = _engine(case, axes)
    num_responses = options.pop("num_responses", 2)
    return built.generate(
        params,
        prompts,
        _sampling(**options),
        jax.random.key(seed),
        num_responses=num_responses,
    )


@pytest.mark.parametrize("case", ["dense_tied_2_levels_head64", "moe_untied"])
def test_sampler_logprobs_equal_the_full_forward(case):
    rollout = _generate(case)
    graphdef, params = ours.model(case)
    built = nnx.merge(graphdef, params)
    whole = [
        inputs.continued(_PROMPTS[n // 2], rollout.tokens[n]) for n in range(len(rollout.tokens))
    ]
    batch = cases.batch([[e] for e in whole], built.config)
    run = jax.jit(lambda b: built(b.text, b.vision, implementation="xla", remat="none"))
    hidden, _ = run(batch)
    logprobs = jax.nn.log_softmax(built.logits(hidden))
    for n, length in enumerate(rollout.lengths):
        start = len(_PROMPTS[n // 2].tokens)
        tokens = rollout.tokens[n, :length]
        expected = logprobs[n, start - 1 : start - 1 + length][np.arange(length), tokens]
        np.testing.assert_allclose(rollout.logprobs[n, :length], expected, atol=1e-4)
        assert not rollout.logprobs[n, length:].any()


def test_prompts_of_any_length_are_read_by_splash_attention(monkeypatch):
    lengths = set()

    def stand_in(q, k, v, segments, *, causal, interpret):
        del interpret
        lengths.add(q.shape[1])
        return attention._xla(q, k, v, segments.ids, causal=causal)

    monkeypatch.setattr(attention, "splash", stand_in)
    case = "dense_tied_2_levels_head64"
    built, params = _engine(case)
    # As stages ask: rows as long as the longest prompt, for all patches of a batch.
    shapes = engine.Shapes(prompt_tokens=37, row_patches=100, row_images=4)
    built = dataclasses.replace(built, shapes=shapes, prefill_implementation="splash")
    sampling, key = _sampling(temperature=0.0), jax.random.key(0)
    rollout = built.generate(params, _PROMPTS, sampling, key, num_responses=1)
    assert lengths
    assert all(length % 128 == 0 for length in lengths)
    expected = _generate(case, temperature=0.0, num_responses=1)
    np.testing.assert_array_equal(rollout.tokens, expected.tokens)
    np.testing.assert_allclose(rollout.logprobs, expected.logprobs, atol=1e-4)


def test_greedy_takes_the_most_likely_token_and_stops_at_an_end_token():
    free = ours.greedy("dense_tied_2_levels_head64", _PROMPTS, 12)
    end = int(free[0, 4])
    rollout = _generate(temperature=0.0, end_token_ids=(end,), num_responses=1)
    for row, expected in enumerate(free):
        stops = np.flatnonzero(expected == end)
        length = int(stops[0]) + 1 if len(stops) else 12
        assert rollout.lengths[row] == length
        assert rollout.ended[row] == bool(len(stops))
        assert rollout.tokens[row, :length].tolist() == expected[:length].tolist()
        assert not rollout.tokens[row, length:].any()


def test_the_same_key_repeats_and_another_does_not():
    first, again, other = _generate(), _generate(), _generate(seed=1)
    assert (first.tokens == again.tokens).all()
    assert (first.tokens != other.tokens).any()
    assert (first.tokens[0] != first.tokens[1]).any()


def test_a_response_does_not_depend_on_the_prompts_beside_it():
    alone = _generate(prompts=_PROMPTS[:1])
    together = _generate()
    np.testing.assert_array_equal(alone.tokens, together.tokens[:2])


def test_prompts_drawn_in_parts_get_the_responses_that_they_get_together():
    together = _generate(num_responses=3)
    built, params = _engine("dense_tied_2_levels_head64")
    parts = [
        built.generate(
            params,
            _PROMPTS[first : first + 1],
            _sampling(),
            jax.random.key(0),
            num_responses=3,
            first_prompt=first,
        )
        for first in range(len(_PROMPTS))
    ]
    assert len({part.tokens.tobytes() for part in parts}) == len(parts)
    for name in ("tokens", "lengths", "ended"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(together, name))
    logprobs = np.concatenate([part.logprobs for part in parts])
    np.testing.assert_allclose(logprobs, together.logprobs, atol=1e-5)


# Four devices for two kv heads: attention's maps stay apart.
@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (1, 2, 4, 1)])
def test_eight_devices_give_the_responses_of_one(sizes):
    single = _generate(temperature=0.0)
    axes = tuple(zip(mesh_lib.AXES, sizes, strict=True))
    spread = _generate(axes=axes, temperature=0.0)
    np.testing.assert_array_equal(spread.tokens, single.tokens)
    np.testing.assert_allclose(spread.logprobs, single.logprobs, atol=1e-4)


def test_responses_longer_than_one_chunk_compile_decoding_once():
    whole = _generate(temperature=0.0, end_token_ids=(), max_tokens=10, num_responses=1)
    built, params = _engine("dense_tied_2_levels_head64")
    before = decode.advance("cpu")._cache_size()
    told = []
    rollout = dataclasses.replace(built, chunk_tokens=4).generate(
        params,
        _PROMPTS,
        _sampling(temperature=0.0, end_token_ids=(), max_tokens=10),
        jax.random.key(0),
        num_responses=1,
        on_chunk=lambda step, ended: told.append((step, ended)),
    )
    assert told == [(4, 0), (8, 0), (10, 0)]
    assert (rollout.tokens == whole.tokens).all()
    assert decode.advance("cpu")._cache_size() == before + 1
