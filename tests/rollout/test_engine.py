"""The sampler against the model's full forward and against responses drawn one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import attention, inputs, sharding
from prism_jax import mesh as mesh_lib
from prism_jax.rollout import decode, engine, layout, memory, prefill, serving
from prism_jax.rollout.sampling import Sampling
from tests.models import cases, ours

_CASE = "dense_tied_2_levels_head64"
_PROMPTS = [*cases.ROWS["rows_of_different_length"], *cases.ROWS["a_video"]]


@functools.cache
def _engine(case: str, axes: tuple = (), tensor: int = 1) -> tuple[engine.Engine, nnx.State]:
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES) if axes else sharding.REPLICATED
    graphdef, params = ours.model(case, rules=rules)
    config, mesh = nnx.merge(graphdef, params).config, None
    if axes:
        trained = mesh_lib.make(dict(axes))
        params = jax.device_put(params, mesh_lib.param_shardings(params, trained, rules))
        mesh = layout.mesh(trained, tensor=tensor)
    graphdef, params = serving.prepare(
        graphdef, params, dtype=jnp.float32, donate=False, mesh=mesh, rules=rules
    )
    built = engine.Engine(
        graphdef=graphdef,
        config=config,
        shapes=engine.Shapes(prompt_tokens=48, prompt_patches=80, prompt_images=4),
        prefill_implementation="xla",
        decode_implementation="xla",
        chunk_tokens=5,
        num_slots=None,
        mesh=mesh,
        rules=rules,
        say=lambda line: None,
    )
    return built, params


def _sampling(**changes) -> Sampling:
    usual = {"temperature": 1.0, "top_k": None, "top_p": None, "max_tokens": 12}
    return Sampling(**(usual | {"end_token_ids": (5, 6)} | changes))


def _generate(
    case=_CASE,
    *,
    built=None,
    axes=(),
    tensor=1,
    num_slots=None,
    prompts=_PROMPTS,
    seed=0,
    **options,
):
    usual, params = _engine(case, axes, tensor)
    built = dataclasses.replace(built or usual, num_slots=num_slots)
    names = ("num_responses", "limits", "first_prompt", "on_chunk", "on_finished")
    given = {name: options.pop(name) for name in names if name in options}
    given = {"num_responses": 2} | given
    return built.generate(params, prompts, _sampling(**options), jax.random.key(seed), **given)


def _same(found: engine.Rollout, expected: engine.Rollout, rows: slice = slice(None)) -> None:
    for name in ("tokens", "lengths", "ended"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name)[rows])
    np.testing.assert_allclose(found.logprobs, expected.logprobs[rows], atol=1e-5)


@functools.cache
def _usual() -> engine.Rollout:
    return _generate()


# With three slots responses follow each other in a slot, behind prompts of different length.
@pytest.mark.parametrize(("case", "num_slots"), [(_CASE, None), ("moe_untied", 3)])
def test_sampler_logprobs_equal_the_full_forward(case, num_slots):
    rollout = _generate(case, num_slots=num_slots)
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
    # As stages ask: as long as the longest prompt.
    shapes = engine.Shapes(prompt_tokens=37, prompt_patches=100, prompt_images=4)
    built = dataclasses.replace(_engine(_CASE)[0], shapes=shapes, prefill_implementation="splash")
    rollout = _generate(built=built, temperature=0.0, num_responses=1)
    assert lengths
    assert all(length % 128 == 0 for length in lengths)
    expected = ours.greedy(_CASE, _PROMPTS, 12)
    for row, length in enumerate(rollout.lengths):
        np.testing.assert_array_equal(rollout.tokens[row, :length], expected[row, :length])


def test_greedy_takes_the_most_likely_token_and_stops_at_an_end_token():
    free = ours.greedy(_CASE, _PROMPTS, 12)
    end = int(free[0, 4])
    rollout = _generate(temperature=0.0, end_token_ids=(end,), num_responses=1)
    for row, expected in enumerate(free):
        stops = np.flatnonzero(expected == end)
        length = int(stops[0]) + 1 if len(stops) else 12
        assert rollout.lengths[row] == length
        assert rollout.ended[row] == bool(len(stops))
        assert rollout.tokens[row, :length].tolist() == expected[:length].tolist()
        assert not rollout.tokens[row, length:].any()


def test_another_key_gives_other_responses():
    first, other = _usual(), _generate(seed=1)
    assert (first.tokens != other.tokens).any()
    assert (first.tokens[0] != first.tokens[1]).any()


def test_prompts_drawn_in_parts_get_the_responses_that_they_get_together():
    parts = [
        _generate(prompts=_PROMPTS[first : first + 1], first_prompt=first)
        for first in range(len(_PROMPTS))
    ]
    assert len({part.tokens.tobytes() for part in parts}) == len(parts)
    for number, part in enumerate(parts):
        _same(part, _usual(), slice(2 * number, 2 * number + 2))


# Two axes of training; copies of the weights on one or two devices each.
@pytest.mark.parametrize(("sizes", "tensor"), [((2, 2, 1, 2, 1), 1), ((1, 2, 1, 4, 1), 2)])
def test_eight_devices_give_the_responses_of_one(monkeypatch, sizes, tensor):
    # Responses in two blocks, prompts in five, where one device has one of each.
    monkeypatch.setattr(memory, "_MOST_BLOCK", 10)
    axes = tuple(zip(mesh_lib.AXES, sizes, strict=True))
    spread = _generate(axes=axes, tensor=tensor, num_slots=8)
    (plan,) = _engine(_CASE, axes, tensor)[0].plans.values()
    assert (plan.block_places, plan.prompt_block_places) == (6, 10)
    monkeypatch.undo()
    _same(spread, _usual())


def test_few_prompts_use_every_device():
    axes = tuple(zip(mesh_lib.AXES, (8, 1, 1, 1, 1), strict=True))
    looks = []
    spread = _generate(axes=axes, prompts=_PROMPTS[:1], num_responses=8, on_chunk=looks.append)
    # One response on each of the eight devices, which all read the prompt.
    assert [np.count_nonzero(look.new_tokens) for look in looks[:1]] == [8]
    assert looks[0].prompt_tokens == 8 * len(_PROMPTS[0].tokens)
    _same(spread, _generate(prompts=_PROMPTS[:1], num_responses=8))


def test_sessions_of_the_same_sizes_compile_one_decoding_and_at_most_four_prefills():
    before = decode.num_programs(), prefill.fill._cache_size()
    looks = []
    built = dataclasses.replace(_engine(_CASE)[0], chunk_tokens=4)
    for seed in (0, 1):
        _generate(
            built=built,
            seed=seed,
            num_slots=6,
            num_responses=3,
            end_token_ids=(),
            limits=[1 + n % 10 for n in range(15)],
            on_chunk=looks.append,
        )
    assert decode.num_programs() == before[0] + 1
    # One prompt or as many as fit, with images or without.
    assert prefill.fill._cache_size() <= before[1] + 4
    assert looks[-1].num_finished == 15
    assert sum(look.new_tokens.sum() for look in looks) == 2 * sum(1 + n % 10 for n in range(15))


def test_a_response_has_its_own_limit():
    limits = [1 + (7 * n) % 12 for n in range(10)]
    finished = []
    rollout = _generate(
        limits=limits, num_slots=4, on_finished=lambda n, tickets: finished.append((n, tickets))
    )
    for row, limit in enumerate(limits):
        length = min(limit, _usual().lengths[row])
        assert rollout.lengths[row] == length
        assert rollout.tokens[row, :length].tolist() == _usual().tokens[row, :length].tolist()
        assert not rollout.tokens[row, length:].any()
    assert sorted(number for number, _ in finished) == list(range(5))
    for number, tickets in finished:
        lengths = [len(ticket.tokens) for ticket in tickets]
        assert lengths == rollout.lengths[2 * number : 2 * number + 2].tolist()


def test_short_and_long_slots_give_the_same_responses(monkeypatch):
    monkeypatch.setattr(memory, "_LEAST_SHORT", 1)
    text = _engine(_CASE)[0].config.text
    place = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 4
    plans = []

    def needed(config, plan, work, limits):
        plans.append(plan)
        return sum(rows * places for rows, places in plan.classes) * place

    monkeypatch.setattr(memory, "needed_bytes", needed)
    monkeypatch.setattr(memory, "free_bytes", lambda devices: int(60 * place / 0.94) + 1)
    built = dataclasses.replace(_engine(_CASE)[0], plans={})
    rollout = _generate(built=built, end_token_ids=())
    # 10 responses of 12 tokens do not fit 60 places: short slots hold 3 of them.
    assert plans[-1].classes == ((8, 3), (2, 12)), plans[-1]
    monkeypatch.undo()
    _same(rollout, _generate(end_token_ids=()))


def test_where_memory_runs_out_half_of_the_slots_go_on(monkeypatch):
    lines, calls = [], []
    usual = engine.Device.advance

    def advance(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return usual(self, *args)

    monkeypatch.setattr(engine.Device, "advance", advance)
    built = dataclasses.replace(_engine(_CASE)[0], say=lines.append, plans={})
    rollout = _generate(built=built, num_slots=10)
    assert ["10 x 12" in lines[0], "half of them" in lines[1], "5 x 12" in lines[2]] == [True] * 3
    _same(rollout, _usual())
