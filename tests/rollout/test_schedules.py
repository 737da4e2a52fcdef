"""Random schedules of requests against responses drawn one by one on the plain path."""

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import config as config_lib
from models import inputs, qwen3_vl, sharding
from prism_jax.rollout import engine, memory, prefill, sampling, serving
from prism_jax.rollout import session as session_lib
from tests.models import cases

_NUM_PROMPTS, _NUM_NUMBERS, _MOST_TOKENS = 8, 5, 12
_KEY = jax.random.key(7)
_VOCAB = 24
_PROMPT_TOKENS = 9


@functools.cache
def _model() -> tuple[nnx.GraphDef, nnx.State, config_lib.Qwen3VLConfig]:
    """Return a text model of one layer, ready for decoding."""
    config = config_lib.from_hf(cases.CONFIGS["dense_tied_2_levels_head64"])
    text = dataclasses.replace(
        config.text,
        vocab_size=_VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        head_dim=8,
        mrope_section=(2, 1, 1),
    )
    config = dataclasses.replace(config, text=text, vision=None, initializer_range=0.6)
    model = qwen3_vl.Qwen3VL(
        config,
        has_head=True,
        moe_implementation=None,
        rules=sharding.REPLICATED,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    graphdef, params = serving.prepare(
        *nnx.split(model),
        dtype=jnp.float32,
        donate=False,
        mesh=None,
        rules=sharding.REPLICATED,
    )
    return graphdef, params, config


def _prompt(number: int) -> inputs.Example:
    length = 1 + number % _PROMPT_TOKENS
    tokens = np.random.default_rng(number).integers(1, _VOCAB, length).astype(np.int32)
    return inputs.Example(tokens=tokens, token_types=0 * tokens, grids=[], pixels=[])


def _sampling(temperature: float = 1.0, max_tokens: int = _MOST_TOKENS, ends: tuple = ()):
    return sampling.Sampling(
        temperature=temperature,
        top_k=None,
        top_p=None,
        max_tokens=max_tokens,
        end_token_ids=ends,
    )


@functools.cache
def _one_by_one(temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and log-probs [prompts, numbers, tokens] of the plain path, one row each."""
    graphdef, params, config = _model()
    prompts = [_prompt(n) for n in range(_NUM_PROMPTS) for _ in range(_NUM_NUMBERS)]
    text = inputs.pack_text(
        [[prompt] for prompt in prompts],
        config=config,
        row_tokens=_PROMPT_TOKENS,
        max_segments=2,
        num_vision_rows=1,
    )
    settings = [_sampling(temperature)] * len(prompts)
    draw = functools.partial(
        sampling.draw, settings=sampling.Settings.of(settings), mode=sampling.Mode.of(settings)
    )

    @jax.jit
    def run(params, text, keys):
        model = nnx.merge(graphdef, params)
        length = _PROMPT_TOKENS + _MOST_TOKENS
        hidden, cache = model.prefill(text, None, implementation="xla", cache_length=length)

        def step(carry, count):
            hidden, cache = carry
            token_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, count)
            tokens, logprobs = draw(model.logits(hidden), token_keys)
            return model.decode_step(tokens, cache, implementation="xla"), (tokens, logprobs)

        return jax.lax.scan(step, (hidden, cache), jnp.arange(_MOST_TOKENS))[1]

    keys = jax.vmap(lambda n: jax.random.fold_in(_KEY, n))(np.arange(len(prompts)))
    shape = (_NUM_PROMPTS, _NUM_NUMBERS, _MOST_TOKENS)
    return tuple(np.asarray(x).T.reshape(shape) for x in run(params, text, keys))


def _open(
    monkeypatch,
    classes: tuple,
    num_prompts: int,
    width: int,
    *,
    blocks: tuple[int, int] = (_MOST_TOKENS, _PROMPT_TOKENS),
    chunk_tokens: int = 4,
):
    plan = memory.Plan(
        num_parts=1,
        classes=classes,
        block_places=blocks[0],
        num_prompts=num_prompts,
        prompt_places=memory.round_up(_PROMPT_TOKENS, blocks[1]),
        prompt_block_places=blocks[1],
        width=width,
        prefill_prompts=min(num_prompts, 4),
    )
    monkeypatch.setattr(memory, "make", lambda *args: plan)
    # Prompts of a look are read in few large rows, or in several small ones.
    monkeypatch.setattr(session_lib, "_CALL_TOKENS", 3)
    graphdef, params, config = _model()
    built = engine.Engine(
        graphdef=graphdef,
        config=config,
        shapes=engine.Shapes(prompt_tokens=1, prompt_patches=1, prompt_images=1),
        prefill_implementation="xla",
        decode_implementation="xla",
        chunk_tokens=chunk_tokens,
        num_slots=None,
        mesh=None,
        rules=sharding.REPLICATED,
        say=lambda line: None,
    )
    work = memory.Work(
        num_groups=1,
        num_responses=1,
        group_responses=1,
        prompt_tokens=_PROMPT_TOKENS,
        prompt_patches=1,
        prompt_images=1,
        response_tokens=_MOST_TOKENS,
    )
    # With a program for short prompts too.
    return built.open(
        params,
        work,
        num_ends=3,
        key_impl=str(jax.random.key_impl(_KEY)),
        least_prefill_tokens=2,
    )


def _check(ticket, prompt: int, temperature: float) -> None:
    """Compare a response with the one drawn alone, cut where it must end."""
    tokens, logprobs = (x[prompt, ticket.number % _NUM_NUMBERS] for x in _one_by_one(temperature))
    length = ticket.sampling.max_tokens
    stops = np.flatnonzero(np.isin(tokens[:length], ticket.sampling.end_token_ids))
    if len(stops):
        length = int(stops[0]) + 1
    assert ticket.tokens == tokens[:length].tolist()
    assert ticket.is_ended == bool(len(stops))
    np.testing.assert_allclose(ticket.logprobs, logprobs[:length], atol=1e-5)


def _submit(session, rng: np.random.Generator, temperature: float, most: int = 4) -> list:
    """Submit random requests; return the prompt and the stream of each response."""
    submitted = []
    for prompt in rng.choice(_NUM_PROMPTS, rng.integers(1, most), replace=False):
        responses = rng.choice(_NUM_NUMBERS, rng.integers(1, 5), replace=False)
        settings = []
        for number in responses:
            # Some end at once: with their first token, or a limit of one.
            first = int(_one_by_one(temperature)[0][prompt, number, 0])
            ends = [(), (3, 4), (first,), (5, 6, 7)][rng.integers(4)]
            settings.append(_sampling(temperature, int(rng.integers(1, _MOST_TOKENS + 1)), ends))
        numbers = [int(prompt) * _NUM_NUMBERS + int(n) for n in responses]
        streams = session.submit(_prompt(int(prompt)), settings, _KEY, numbers=numbers)
        submitted += [(int(prompt), stream) for stream in streams]
    return submitted


def test_few_prompts_are_read_in_small_rows_and_many_in_large_ones():
    one = prefill.shape(tokens=128, patches=512, frames=1, implementation="xla")
    shapes = prefill.levels(one, 64, least_tokens=256, implementation="xla")
    assert [shape.tokens for shape in shapes] == [128, 512, 2048, 8192]

    def read(count: int, call_tokens: int) -> list[int]:
        tokens = np.ones(60, np.int32)
        prompt = inputs.Example(tokens=tokens, token_types=0 * tokens, grids=[], pixels=[])
        calls = prefill.split(
            [[(entry, prompt) for entry in range(count)]], shapes, call_tokens=call_tokens
        )
        entries = [entry for _, (row,) in calls for entry, _ in row]
        assert sorted(entries) == list(range(count))
        assert all(60 * len(row) <= shape.tokens for shape, (row,) in calls)
        return [shape.tokens for shape, _ in calls]

    assert read(0, 256) == []
    assert read(1, 256) == [128]
    assert read(5, 256) == [512]  # not three of 128: each call reads the weights
    assert read(5, 8) == [128] * 3
    assert read(40, 256) == [2048, 512]
    assert read(64, 256) == [2048] * 2
    assert read(64, 4096) == [8192]


# One slot; few, fewer than responses to a prompt; short ones and long ones, of which a response
# that outgrows its slot takes the next; more slots than responses.
@pytest.mark.parametrize(
    ("classes", "blocks", "num_prompts", "width", "num_schedules", "temperature"),
    [
        (((1, 12),), (4, 3), 1, 1, 60, 1.0),
        (((3, 12),), (4, 9), 2, 2, 170, 0.0),
        (((3, 2), (2, 6), (1, 12)), (2, 3), 4, 3, 270, 1.0),
        (((30, 12),), (12, 9), 6, 5, 500, 1.0),
    ],
)
def test_every_schedule_gives_the_responses_drawn_one_by_one(
    monkeypatch, classes, blocks, num_prompts, width, num_schedules, temperature
):
    session = _open(monkeypatch, classes, num_prompts, width, blocks=blocks)
    rng = np.random.default_rng(num_schedules)
    for _ in range(num_schedules):
        submitted = _submit(session, rng, temperature)
        if rng.integers(3) == 0:  # more come while these are on their way
            session.look()
            submitted += _submit(session, rng, temperature, most=3)
        for prompt, stream in submitted:
            _check(stream.wait(), prompt, temperature)
    assert session._slots.is_idle()
    assert session._slots.entries == [[None] * num_prompts]
    session.close()


def test_a_cancelled_response_leaves_its_slot_and_the_others_as_they_are(monkeypatch):
    session = _open(monkeypatch, ((2, 12),), 2, 2, chunk_tokens=3)
    rng = np.random.default_rng(1)
    settings = [_sampling() for _ in range(5)]
    streams = session.submit(_prompt(2), settings, _KEY, numbers=[10 + n for n in range(5)])
    session.look()
    session.look()
    streams[0].cancel()  # decoding
    streams[3].cancel()  # waiting
    cancelled = [streams[n].wait() for n in (0, 3)]
    expected = _one_by_one(1.0)[0][2]
    assert [len(ticket.tokens) for ticket in cancelled] == [6, 0]
    assert cancelled[0].tokens == expected[0, :6].tolist()
    for number in (1, 2, 4):
        _check(streams[number].wait(), 2, 1.0)
    # The session goes on.
    for prompt, stream in _submit(session, rng, 1.0):
        _check(stream.wait(), prompt, 1.0)
    session.close()


def test_threads_read_tokens_as_they_come(monkeypatch):
    session = _open(monkeypatch, ((3, 12),), 3, 3)
    session.start()
    found: dict[int, list] = {}

    def ask(prompt: int) -> None:
        (stream,) = session.submit(_prompt(prompt), [_sampling()], _KEY, numbers=[5 * prompt])
        found[prompt] = list(stream)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    session.close()
    tokens, logprobs = _one_by_one(1.0)
    for prompt in range(6):
        assert [token for token, _ in found[prompt]] == tokens[prompt, 0].tolist()
        np.testing.assert_allclose(
            [logprob for _, logprob in found[prompt]], logprobs[prompt, 0], atol=1e-5
        )


def test_what_a_session_has_no_room_for_is_refused(monkeypatch):
    # More places, as blocks are rounded up, are not more room.
    session = _open(monkeypatch, ((1, 16),), 1, 1, blocks=(8, 6))
    long = dataclasses.replace(
        _prompt(0), tokens=np.ones(10, np.int32), token_types=np.zeros(10, np.int32)
    )
    for prompt, settings, told in (
        (long, _sampling(), "9 prompt tokens, got 10"),
        (_prompt(0), _sampling(max_tokens=13), "12 max_tokens, got 13"),
        (_prompt(0), _sampling(ends=(1, 2, 3, 4)), "3 end tokens, got 4"),
    ):
        with pytest.raises(ValueError, match=f"room for {told}"):
            session.submit(prompt, [settings], _KEY, numbers=[0])
    session.close()
