"""Shared by the benchmarks of rollouts: random weights, prompts, lengths, a timed rollout."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from benchmarks import kernel_times, sizes
from models import inputs, qwen3_vl
from models.config import Qwen3VLConfig
from prism_jax import mesh as mesh_lib
from prism_jax.rollout import engine, layout, serving
from prism_jax.rollout.sampling import Sampling
from prism_jax.rollout.session import Look

_SIGMA = 0.72  # of the logarithm: 5 % of the lengths are above 2.5 times the mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """An engine with random weights."""

    engine: engine.Engine
    params: nnx.State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """A rollout and when each look was."""

    seconds: float
    num_tokens: int
    looks: tuple[Look, ...]
    stamps: tuple[float, ...]  # seconds since the beginning, of each look


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ragged:
    """A rollout whose responses end by log-normal limits, in order those of a prompt."""

    prompts: int
    responses: int  # to each prompt
    limits: np.ndarray  # int[prompts * responses]
    most: int  # of a response


def random_sampler(
    config: Qwen3VLConfig,
    devices: Sequence[jax.Device],
    *,
    chunk_tokens: int,
    tensor: int,
    dtype: DTypeLike = jnp.bfloat16,
) -> Sampler:
    """Make a model as training holds it, cut over all devices, and bring it to the sampler."""
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES)
    trained = mesh_lib.make({"data": 1, "fsdp": -1, "tensor": 1, "expert": 1}, devices)

    def make() -> nnx.Module:
        return qwen3_vl.Qwen3VL(
            config,
            has_head=True,
            moe_implementation=None,
            rules=rules,
            dtype=dtype,
            param_dtype=dtype,
            rngs=nnx.Rngs(0),
        )

    graphdef, abstract = qwen3_vl.abstract(make)
    where = mesh_lib.param_shardings(abstract, trained, rules)
    with jax.set_mesh(trained):
        params = jax.jit(lambda: nnx.state(make()), out_shardings=where)()
    mesh = layout.mesh(trained, tensor=tensor)
    graphdef, params = serving.prepare(
        graphdef, params, dtype=dtype, donate=True, mesh=mesh, rules=rules
    )
    on_gpu = jax.default_backend() == "gpu"
    built = engine.Engine(
        graphdef=graphdef,
        config=config,
        shapes=engine.Shapes(prompt_tokens=64, prompt_patches=128, prompt_images=1),
        prefill_implementation="cudnn" if on_gpu else "xla",
        decode_implementation="cudnn" if on_gpu else "xla",
        chunk_tokens=chunk_tokens,
        num_slots=None,
        mesh=mesh,
        rules=rules,
        say=kernel_times.say,
    )
    return Sampler(engine=built, params=params)


def text_prompts(config: Qwen3VLConfig, count: int, tokens: int) -> list[inputs.Example]:
    """Return prompts of random words."""
    most = min(config.text.vocab_size - 10, 150_000)
    words = np.random.default_rng(0).integers(1, most, (count, tokens)).astype(np.int32)
    return [
        inputs.Example(tokens=row, token_types=np.zeros(tokens, np.int32), grids=(), pixels=())
        for row in words
    ]


def image_prompts(config: Qwen3VLConfig, count: int) -> list[inputs.Example]:
    """Return prompts of 324 tokens around one picture of 512 x 512 pixels."""
    one = sizes.example(config)
    prompt = inputs.Example(
        tokens=one["tokens"].astype(np.int32),
        token_types=one["token_types"].astype(np.int32),
        grids=[tuple(int(n) for n in one["grids"][0])],
        pixels=[one["pixels"]],
    )
    return [prompt] * count


def lengths(count: int, *, mean: float, most: int) -> np.ndarray:
    """Return log-normal lengths, the same for every caller."""
    samples = np.random.default_rng(1).lognormal(np.log(mean) - _SIGMA**2 / 2, _SIGMA, count)
    return np.clip(np.round(samples), 1, most).astype(int)


def ragged(*, is_tiny: bool) -> Ragged:
    """Return the ragged rollout of the records."""
    prompts, responses, mean, most = (2, 4, 12, 40) if is_tiny else (32, 16, 1550, 8192)
    limits = lengths(prompts * responses, mean=mean, most=most)
    return Ragged(prompts=prompts, responses=responses, limits=limits, most=most)


def run(
    sampler: Sampler,
    prompts: Sequence[inputs.Example],
    *,
    num_responses: int,
    limits: Sequence[int],
    num_slots: int | None,
    max_tokens: int,
) -> Timed:
    """Draw responses that end by their limits alone, in slots for `max_tokens`."""
    looks, stamps = [], []
    sampling = Sampling(
        temperature=1.0, top_k=None, top_p=None, max_tokens=max_tokens, end_token_ids=()
    )
    begun = time.perf_counter()

    def seen(look: Look) -> None:
        looks.append(look)
        stamps.append(time.perf_counter() - begun)

    rollout = dataclasses.replace(sampler.engine, num_slots=num_slots).generate(
        sampler.params,
        prompts,
        sampling,
        jax.random.key(0),
        num_responses=num_responses,
        limits=limits,
        on_chunk=seen,
    )
    seconds = time.perf_counter() - begun
    if rollout.lengths.tolist() != list(limits):
        raise RuntimeError("a response did not reach its limit")
    return Timed(
        seconds=seconds,
        num_tokens=int(rollout.lengths.sum()),
        looks=tuple(looks),
        stamps=tuple(stamps),
    )


def needed_bytes(sampler: Sampler, look: Look) -> float:
    """Return the bytes that the steps of a look must read, over all devices.

    The weights of the text model once a step and copy, the tied head with them; each token's keys
    and values in its response, and those of its prompt once for all that continue it.
    """
    text, mesh = sampler.engine.config.text, sampler.engine.mesh
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(sampler.params["text"]))
    if not text.tie_word_embeddings:  # of the other table a few rows
        weights -= 2 * text.vocab_size * text.hidden_size
    place = 2 * 2 * text.num_layers * text.num_kv_heads * text.head_dim
    last, new = look.tokens.astype(float), look.new_tokens.astype(float)
    places = (new * (2 * last - new + 1) / 2).sum() + look.num_steps * look.prompt_tokens
    return look.num_steps * weights * mesh.shape["data"] + place * places


def copy_rate(gigabytes: float) -> float:
    """Return bytes read and written a second by large copies on a device, ten queued at a time."""
    x = jnp.ones(int(gigabytes * 5e8), jnp.bfloat16)
    copy = jax.jit(lambda x: -x)
    copy(x).block_until_ready()
    rates = []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(10):
            y = copy(x)
        y.block_until_ready()
        rates.append(20 * x.nbytes / (time.perf_counter() - begun))
    return float(np.median(rates))


def steady(sampler: Sampler, timed: Timed, *, rate: float) -> dict:
    """Return the steady part, from the first look to the last that has every slot running."""
    full = timed.looks[0].new_tokens.astype(bool)
    last = max(
        number
        for number, look in enumerate(timed.looks)
        if (look.new_tokens[full] == look.num_steps).all()
    )
    looks = timed.looks[1 : last + 1]
    seconds = timed.stamps[last] - timed.stamps[0]
    steps = sum(look.num_steps for look in looks)
    tokens = sum(int(look.new_tokens.sum()) for look in looks)
    needed = sum(needed_bytes(sampler, look) for look in looks)
    text = sampler.engine.config.text
    place = 2 * 2 * text.num_layers * text.num_kv_heads * text.head_dim
    apart = sum(look.num_steps * (look.reader_tokens - look.prompt_tokens) for look in looks)
    return {
        "slots": int(full.sum()),
        "milliseconds_a_step": 1e3 * seconds / steps,
        "tokens_per_second": tokens / seconds,
        "needed_gigabytes_a_step": needed / steps / 1e9,
        "of_copy": needed / rate / seconds,
        "of_copy_if_each_response_read_its_prompt": (needed + place * apart) / rate / seconds,
        "whole_seconds": timed.seconds,
        "whole_tokens_per_second": timed.num_tokens / timed.seconds,
    }
