"""Time decoding with random weights made on the device, against what reading them must take.

    python -m benchmarks.decode --size=4b --profile --out=FILE.json       (one GPU; no checkpoint)
    python -m benchmarks.decode --size=tiny --prompt_tokens=16 --response_tokens=16   (CPU)

The cache of every row has `prompt_tokens + response_tokens` places. The first chunk of a response
compiles and warms up; the others are timed as the engine runs them, one look of the host a chunk.
Needs the packages of models/ and prism_jax/rollout/ alone: JAX, Flax, NumPy and jaxtyping.

  program    what a step does
  engine     everything, as `Engine.generate` runs it
  apart      the same with q, k, v and gate, up as separate matmuls
  greedy     engine without noise: the most likely token
  counted    engine in a loop of known length, which asks the host nothing after a step
  layers     the layers alone: no head, no sampling
  attention  cache writes and attention alone, layer after layer
  head       the head's logits and their maximum alone
  draw       logits and sampling alone
"""

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import kernel_times, sizes
from models import attention, decoder_layer, qwen3_vl, sharding
from models.config import Qwen3VLConfig
from models.text import Cache
from prism_jax.rollout import decode, serving
from prism_jax.rollout import sampling as sampling_lib
from prism_jax.rollout.sampling import Sampling

_RATED_TERABYTES = 2.9  # what a copy reached on an H100 80GB HBM3
_ABLATIONS = ("apart", "greedy", "counted", "layers", "attention", "head", "draw")
_USUAL_ABLATIONS = ("apart", "greedy", "attention", "draw")
_TOP_KERNELS = 25
_GROUPS = (
    ("attention", r"cudnn|fmha|flash|sdpa"),
    ("matmul", r"gemm|nvjet|cutlass|cublas|splitk|wgmma|_dot"),
    ("cache write", r"scatter"),
    ("copy and fill", r"copy|memset|memcpy|transpose|concatenate"),
    ("reduction", r"reduce|softmax|triton"),
    ("elementwise", r"fusion|fused"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Say what one program works on."""

    graphdef: nnx.GraphDef
    params: nnx.State
    config: Qwen3VLConfig
    rows: int
    prompt_tokens: int
    chunk_tokens: int
    implementation: attention.Implementation
    sampling: Sampling


def random_model(config: Qwen3VLConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Make a text model with random bfloat16 weights on the device."""
    config = dataclasses.replace(config, vision=None)

    def make() -> nnx.Module:
        return qwen3_vl.Qwen3VL(
            config,
            has_head=True,
            moe_implementation=None,
            rules=sharding.REPLICATED,
            dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16,
            rngs=nnx.Rngs(0),
        )

    graphdef, _ = qwen3_vl.abstract(make)
    return graphdef, jax.jit(lambda: nnx.state(make()))()


def random_state(case: Case) -> decode.DecodeState:
    """Return the state behind a prefill of random prompts of one length."""
    text, rows = case.config.text, case.rows
    places = case.prompt_tokens + case.sampling.max_tokens
    shape = (rows, places, text.num_kv_heads, text.head_dim)
    make = jax.jit(lambda key: 0.3 * jax.random.normal(key, shape, jnp.bfloat16))
    keys = jax.random.split(jax.random.key(1), 2 * text.num_layers)
    caches = [make(key) for key in keys]
    lengths = jnp.full(rows, case.prompt_tokens, jnp.int32)
    return decode.DecodeState(
        cache=Cache(
            keys=caches[::2], values=caches[1::2], lengths=lengths, next_positions=lengths + 0
        ),
        hidden=jax.random.normal(jax.random.key(2), (rows, text.hidden_size), jnp.bfloat16),
        tokens=jnp.zeros((rows, case.sampling.max_tokens), jnp.int32),
        logprobs=jnp.zeros((rows, case.sampling.max_tokens), jnp.float32),
        lengths=jnp.zeros(rows, jnp.int32),
        is_ended=jnp.zeros(rows, bool),
        keys=jax.random.split(jax.random.key(3), rows),
        step=jnp.int32(0),
    )


def _counted(model: nnx.Module, state: decode.DecodeState, case: Case) -> decode.DecodeState:
    return decode.step(model, state, sampling=case.sampling, implementation=case.implementation)


def _layers(model: nnx.Module, state: decode.DecodeState, case: Case) -> decode.DecodeState:
    tokens = (jnp.arange(case.rows) + state.step) % case.config.text.vocab_size
    hidden, cache = model.decode_step(tokens, state.cache, implementation=case.implementation)
    return dataclasses.replace(state, hidden=hidden, cache=cache, step=state.step + 1)


def _attention(model: nnx.Module, state: decode.DecodeState, case: Case) -> decode.DecodeState:
    del model
    text, cache = case.config.text, state.cache
    keys, values = [], []
    mixed = state.hidden[:, None, None, : text.head_dim].repeat(text.num_heads, 2)
    for k, v in zip(cache.keys, cache.values, strict=True):
        new = mixed[:, :, : text.num_kv_heads]
        keys.append(decoder_layer.write(k, new, cache.lengths))
        values.append(decoder_layer.write(v, new, cache.lengths))
        mixed = attention.attend_decode(
            mixed, keys[-1], values[-1], cache.lengths + 1, implementation=case.implementation
        )
    longer = dataclasses.replace(cache, keys=keys, values=values, lengths=cache.lengths + 1)
    hidden = state.hidden.at[:, : text.head_dim].set(mixed[:, 0, 0])
    return dataclasses.replace(state, hidden=hidden, cache=longer, step=state.step + 1)


def _head(model: nnx.Module, state: decode.DecodeState, case: Case) -> decode.DecodeState:
    del case
    best = model.logits(state.hidden).max(-1, keepdims=True)
    hidden = state.hidden + (1e-6 * best).astype(state.hidden.dtype)
    return dataclasses.replace(state, hidden=hidden, step=state.step + 1)


def _draw(model: nnx.Module, state: decode.DecodeState, case: Case) -> decode.DecodeState:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.step)
    tokens, logprobs = sampling_lib.draw(model.logits(state.hidden), keys, case.sampling)
    told = (1e-6 * (logprobs + tokens))[:, None]
    hidden = state.hidden + told.astype(state.hidden.dtype)
    return dataclasses.replace(state, hidden=hidden, step=state.step + 1)


_PARTS = {
    "counted": _counted,
    "layers": _layers,
    "attention": _attention,
    "head": _head,
    "draw": _draw,
}


def lower(program: str, case: Case) -> Callable:
    """Return the program's lowered form for `chunk_tokens` steps; it consumes its state."""
    state, platform = jax.eval_shape(lambda: random_state(case)), jax.default_backend()
    if program not in _PARTS:
        return decode.advance(platform).lower(
            case.graphdef,
            case.params,
            state,
            sampling=case.sampling,
            implementation=case.implementation,
            chunk_tokens=case.chunk_tokens,
        )

    def run(params: nnx.State, state: decode.DecodeState) -> decode.DecodeState:
        model = nnx.merge(case.graphdef, params)
        one = _PARTS[program]
        return jax.lax.fori_loop(
            0, case.chunk_tokens, lambda _, state: one(model, state, case), state
        )

    options = decode.compiler_options(platform)
    return jax.jit(run, donate_argnums=1, compiler_options=options).lower(case.params, state)


def needed_bytes(program: str, case: Case, mean_tokens: float) -> float:
    """Return what a step must read: weights, and keys and values of the tokens so far."""
    text = case.config.text
    head = text.vocab_size * text.hidden_size * 2
    tables = 1 if text.tie_word_embeddings else 2
    layers = sum(leaf.nbytes for leaf in jax.tree.leaves(case.params)) - tables * head
    cache = case.rows * mean_tokens * 2 * text.num_layers * text.num_kv_heads * text.head_dim * 2
    return {
        "layers": layers + cache,
        "attention": cache,
        "head": head,
        "draw": head,
    }.get(program, layers + cache + head)


def measure(program: str, case: Case, *, num_chunks: int, copy_rate: float) -> dict:
    """Time `num_chunks` chunks behind the one that warms up."""
    begun = time.perf_counter()
    compiled = lower(program, case).compile()
    compile_seconds = time.perf_counter() - begun
    state = compiled(case.params, random_state(case))
    int(state.step)
    chunks = []
    for _ in range(num_chunks):
        begun = time.perf_counter()
        state = compiled(case.params, state)
        int(state.step)
        chunks.append((time.perf_counter() - begun) / case.chunk_tokens)
    seconds = float(np.mean(chunks))
    # In the middle of the timed steps; the token of a step is read too.
    mean_tokens = case.prompt_tokens + case.chunk_tokens * (1 + num_chunks / 2) + 0.5
    needed = needed_bytes(program, case, mean_tokens)
    result = {
        "program": program,
        "attention": case.implementation,
        "rows": case.rows,
        "mean_tokens": mean_tokens,
        "milliseconds_a_step": seconds * 1e3,
        "milliseconds_a_step_by_chunk": [chunk * 1e3 for chunk in chunks],
        "tokens_per_second": case.rows / seconds,
        "needed_gigabytes_a_step": needed / 1e9,
        "terabytes_per_second": needed / seconds / 1e12,
        f"of_{_RATED_TERABYTES}_terabytes_per_second": needed / seconds / _RATED_TERABYTES / 1e12,
        "of_copy": needed / seconds / copy_rate,
        "temporary_megabytes": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "compile_seconds": compile_seconds,
    }
    kernel_times.report(result)
    return result


def copy_bandwidth(gigabytes: float) -> float:
    """Return bytes read and written a second by large copies, ten queued at a time."""
    x = jnp.ones(int(gigabytes * 5e8), jnp.bfloat16)
    run = jax.jit(lambda x: -x)
    run(x).block_until_ready()
    rates = []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(10):
            y = run(x)
        y.block_until_ready()
        rates.append(20 * x.nbytes / (time.perf_counter() - begun))
    return float(np.median(rates))


def profile(case: Case) -> dict:
    """Trace a warm chunk kernel by kernel, without command buffers, which would hide them."""
    options = kernel_times.NO_COMMAND_BUFFERS if jax.default_backend() == "gpu" else {}
    compiled = lower("engine", case).compile(options)
    state = jax.block_until_ready(compiled(case.params, random_state(case)))
    seconds, events = kernel_times.trace(lambda: compiled(case.params, state))
    traced = {"milliseconds_a_step_traced": seconds * 1e3 / case.chunk_tokens}
    return traced | kernel_times.summarize(
        events, case.chunk_tokens, groups=_GROUPS, num_kernels=_TOP_KERNELS
    )


def run(args: argparse.Namespace) -> dict:
    """Measure what was asked for."""
    config = sizes.SIZES[args.size]
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "size": args.size,
        "prompt_tokens": args.prompt_tokens,
        "response_tokens": args.response_tokens,
    }
    rate = copy_bandwidth(0.02 if args.size == "tiny" else 2.0)
    result["copy_terabytes_per_second"] = rate / 1e12
    stacked_graph, stacked = random_model(config)
    common = {"dtype": jnp.bfloat16}
    apart = None
    if "apart" in args.programs:
        apart = serving.prepare(stacked_graph, stacked, donate=False, join=False, **common)
    graphdef, params = serving.prepare(stacked_graph, stacked, donate=True, **common)
    implementation = args.attention
    if implementation == "auto":
        implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    usual = {"top_k": None, "top_p": None, "end_token_ids": ()}
    case = Case(
        graphdef=graphdef,
        params=params,
        config=config,
        rows=args.rows[0],
        prompt_tokens=args.prompt_tokens,
        chunk_tokens=args.chunk_tokens,
        implementation=implementation,
        sampling=Sampling(temperature=1.0, max_tokens=args.response_tokens, **usual),
    )
    all_chunks = args.response_tokens // args.chunk_tokens - 1
    result["results"] = found = []
    for rows in args.rows:
        many = dataclasses.replace(case, rows=rows)
        found.append(measure("engine", many, num_chunks=all_chunks, copy_rate=rate))
    if args.profile:
        result["profile"] = profile(dataclasses.replace(case, chunk_tokens=args.chunk_tokens // 8))
        kernel_times.report(result["profile"])
    for program in args.programs:
        changed = case
        if program == "apart":
            changed = dataclasses.replace(case, graphdef=apart[0], params=apart[1])
        if program == "greedy":
            greedy = dataclasses.replace(case.sampling, temperature=0.0)
            changed = dataclasses.replace(case, sampling=greedy)
        chunks = min(3, all_chunks) if program in _PARTS else all_chunks
        found.append(measure(program, changed, num_chunks=chunks, copy_rate=rate))
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=list(sizes.SIZES), default="4b")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 16, 128])
    parser.add_argument("--prompt_tokens", type=int, default=512)
    parser.add_argument("--response_tokens", type=int, default=512)
    parser.add_argument("--chunk_tokens", type=int, default=64)
    parser.add_argument("--programs", nargs="*", choices=_ABLATIONS, default=_USUAL_ABLATIONS)
    parser.add_argument("--attention", choices=("auto", "cudnn", "xla"), default="auto")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(arguments)
    if args.chunk_tokens < 1 or args.response_tokens < 2 * args.chunk_tokens:
        parser.error("--response_tokens must hold at least two chunks of --chunk_tokens")
    if args.profile and args.chunk_tokens < 8:
        parser.error("--profile traces an eighth of a chunk: --chunk_tokens must be at least 8")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the result."""
    args = parse(arguments)
    text = json.dumps(run(args), indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
