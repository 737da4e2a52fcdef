"""The work that the training records time: an SFT step, the head, and a policy's update."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import train_cases, train_variants
from models import inputs, lora, qwen3_vl, sharding
from prism_jax import batches
from prism_jax import mesh as mesh_lib
from prism_jax import rows as packed_rows
from prism_jax.losses import logprob
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import loss as policy_loss
from prism_jax.training import optim, optim_kinds, train_state, train_step

NO_TRITON = {"xla_gpu_enable_triton_gemm": False}
# A matmul whose result is kept in a stack and needed besides is else computed twice.
PLAIN = {"xla_gpu_enable_dynamic_slice_fusion": False}
# XLA computes matmuls again where a program needs more than four fifths of the card.
NO_REMAT = {"xla_disable_hlo_passes": "rematerialization"}
_STEPS = 6
# Prompt and picture, responses, and the rows of a policy's update.
_GROUP = {"prompt": 1000, "patches": 32, "responses": 16, "shortest": 1200, "longest": 1800}
_TINY_GROUP = {"prompt": 24, "patches": 4, "responses": 4, "shortest": 5, "longest": 9}


def _options(options: dict[str, Any]) -> dict[str, Any] | None:
    """Return compiler options where they mean something."""
    return options if jax.default_backend() == "gpu" else None


def _timed(run: Callable[[], Any]) -> list[float]:
    """Return the seconds of several runs behind two that warm up."""
    seconds = []
    for _ in range(_STEPS + 2):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begun)
    return sorted(seconds[2:])


def _memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    stats = compiled.memory_analysis()
    return {
        "argument_gigabytes": stats.argument_size_in_bytes / 1e9,
        "temporary_gigabytes": stats.temp_size_in_bytes / 1e9,
    }


def _size(name: str) -> train_cases.Size:
    size = train_cases.SIZES[name]
    return dataclasses.replace(size, filled=train_cases.FULL)


def _optimizer(params: nnx.State, states: str, frozen: tuple[str, ...]) -> optim.Optimizer:
    return optim.make(
        params,
        kind="adamw",
        numbers=optim_kinds.Numbers(b1=0.9, b2=0.999, eps=1e-8, mu_dtype=states, nu_dtype=states),
        schedule=lambda step: jnp.full((), 1e-6),
        weight_decay=0.0,
        no_decay=(),
        groups=(*((pattern, None) for pattern in frozen), (".*", 1.0)),
        clip_norm=1.0,
        rounding="nearest",
        memory="device",
    )


def _abstract(
    size: train_cases.Size, states: str, rules: sharding.Rules, lora_rank: int | None
) -> tuple[Callable, nnx.GraphDef, nnx.State]:
    """Return the function that makes the model, its graph and its parameters as shapes."""
    is_cpu = jax.default_backend() == "cpu"

    def make(rngs: nnx.Rngs) -> nnx.Module:
        model = qwen3_vl.Qwen3VL(
            size.config,
            has_head=True,
            moe_implementation=None,
            rules=rules,
            dtype=jnp.float32 if is_cpu else jnp.bfloat16,
            param_dtype=jnp.dtype(states),
            rngs=rngs,
        )
        if lora_rank is not None:
            targets = (r"text/layers/attn/(q|k|v|o)", r"text/layers/mlp/.*")
            lora.add(model, rank=lora_rank, alpha=2.0 * lora_rank, targets=targets, rngs=rngs)
        return model

    return make, *train_state.abstract_params(make, param_dtype=jnp.dtype(states))


def sft(
    name: str,
    *,
    states: str,
    remat: str,
    options: dict[str, Any],
    lora_rank: int | None = None,
    num_devices: int = 1,
    chunk_tokens: int | None = None,
    observe: Callable[[jax.stages.Compiled, Callable[[], Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Time SFT steps; a program that cannot run says why.

    Args:
      chunk_tokens: through the head at a time; None: those of the size.
      observe: (compiled step, function that runs it once) -> more to tell.
    """
    size = dataclasses.replace(_size(name), remat=remat, rows=num_devices)
    if chunk_tokens is not None:
        size = dataclasses.replace(size, chunk_tokens=chunk_tokens)
    description = {"states": states, "remat": remat, "options": options, "devices": num_devices}
    description["chunk_tokens"] = size.chunk_tokens
    description |= {"lora_rank": lora_rank, "size": name}
    sizes = dict.fromkeys(mesh_lib.AXES, 1) | {"fsdp": num_devices}
    mesh = mesh_lib.make(sizes, jax.devices()[:num_devices])
    try:
        with jax.set_mesh(mesh):
            return description | _sft(size, states, options, lora_rank, mesh, observe)
    except jax.errors.JaxRuntimeError as error:
        return description | {"error": str(error)[:500]}


def _sft(size, states, options, lora_rank, mesh, observe) -> dict[str, Any]:
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES)
    make, graphdef, params = _abstract(size, states, rules, lora_rank)
    frozen = size.frozen if lora_rank is None else (lora.FROZEN,)
    optimizer = _optimizer(params, states, frozen)
    shardings = train_state.shardings(
        train_state.abstract_state(params, optimizer),
        of_params=lambda p: mesh_lib.param_shardings(p, mesh, rules),
        replicated=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )
    case = train_variants.case_of("default", size, ablate="default", dtype=jnp.dtype("bfloat16"))
    step = train_step.make_train_step(
        graphdef,
        functools.partial(train_variants.loss_fn, case),
        optimizer,
        weights_fn=train_variants.weights,
        coefficients={"nll": 1.0},
        num_microbatches=1,
        shardings=shardings,
        compiler_options=_options(options),
    )
    host = train_cases.make_batch(size)
    batch = batches.to_devices(host, mesh, rules, num_rows=size.rows)
    key = jax.random.key(1)
    begun = time.perf_counter()
    abstract = train_state.with_shardings(train_state.abstract_state(params, optimizer), shardings)
    compiled = step.lower(abstract, batch, key).compile()
    compile_seconds = time.perf_counter() - begun
    state = train_state.init(
        make, optimizer, jax.random.key(0), param_dtype=jnp.dtype(states), shardings=shardings
    )
    held = [state]
    del state

    def run():
        held[0], metrics = compiled(held[0], batch, key)
        return metrics

    seconds = _timed(run)
    median = seconds[len(seconds) // 2]
    observed = {} if observe is None else observe(compiled, run)
    held.clear()
    tokens = train_cases.num_tokens(host)
    return {
        "seconds_a_step": seconds,
        "tokens_a_step": tokens,
        "tokens_per_second": tokens / median,
        "compile_seconds": compile_seconds,
        "matmul_parameters": train_cases.matmul_parameters(size),
        **_memory(compiled),
        **observed,
    }


def head(name: str) -> dict[str, Any]:
    """Time the head's loss with gradients, and its matmuls alone."""
    text = train_cases.SIZES[name].config.text
    num_tokens, chunk = (8192, 2048) if name != "tiny" else (64, 32)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (num_tokens, text.hidden_size), dtype)
    table = jax.random.normal(keys[1], (text.vocab_size, text.hidden_size), dtype) * 0.02
    targets = jax.random.randint(keys[2], (num_tokens,), 0, text.vocab_size)
    weights = jnp.full((num_tokens,), -1.0 / num_tokens, jnp.float32)

    def chunked(hidden, table):
        return logprob.weighted_logprobs(
            hidden, table, targets, weights, temperature=1.0, chunk_tokens=chunk
        )[0]

    def naive(hidden, table):
        logits = jnp.einsum("td,vd->tv", hidden, table, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)
        return (picked[:, 0] * weights).sum()

    def matmuls(hidden, table, *, is_recomputed):
        logits = again = jnp.einsum("td,vd->tv", hidden, table)
        if is_recomputed:
            again = jnp.einsum("td,vd->tv", hidden * 2, table)
        inner = jnp.einsum("tv,vd->td", logits, table)
        return inner, jnp.einsum("tv,td->vd", again, hidden)

    programs = {
        "chunked": jax.grad(chunked, argnums=(0, 1)),
        "naive": jax.grad(naive, argnums=(0, 1)),
        "four_matmuls": functools.partial(matmuls, is_recomputed=True),
        "three_matmuls": functools.partial(matmuls, is_recomputed=False),
    }
    result: dict[str, Any] = {"seconds": {}, "temporary_bytes": {}, "all_seconds": {}}
    result |= {"tokens": num_tokens, "chunk_tokens": chunk}
    for program, function in programs.items():
        compiled = jax.jit(function).lower(hidden, table).compile()
        result["temporary_bytes"][program] = compiled.memory_analysis().temp_size_in_bytes
        if program != "naive":
            seconds = _timed(functools.partial(compiled, hidden, table))
            result["all_seconds"][program] = seconds
            result["seconds"][program] = seconds[len(seconds) // 2]
    return result


def _group(name: str, size: train_cases.Size) -> tuple[inputs.Example, list[np.ndarray]]:
    numbers = _TINY_GROUP if name == "tiny" else _GROUP
    rng = np.random.default_rng(0)
    config, side = size.config, numbers["patches"]
    shown = side * side // config.vision.spatial_merge_size**2
    most = config.text.vocab_size - 10
    words = rng.integers(1, most, numbers["prompt"] - shown)
    tokens = np.concatenate([np.full(shown, config.image_token_id), words])
    prompt = inputs.Example(
        tokens=tokens,
        token_types=(tokens == config.image_token_id).astype(np.int32),
        grids=[(1, side, side)],
        pixels=[rng.integers(0, 256, (side * side, config.vision.patch_dim), np.uint8)],
    )
    lengths = np.linspace(numbers["shortest"], numbers["longest"], numbers["responses"]).astype(int)
    return prompt, [rng.integers(1, most, length) for length in rng.permutation(lengths)]


def policy(name: str, *, is_shared: bool) -> dict[str, Any]:
    """Time the policy's update of one group, with bf16 states."""
    size = _size(name)
    numbers = _TINY_GROUP if name == "tiny" else _GROUP
    prompt, responses = _group(name, size)
    shape = packed_rows.row_shape(
        packed_rows.Largest(
            num_units=len(responses),
            unit_sequences=1,
            unit_tokens=numbers["prompt"] + numbers["longest"],
            continued_tokens=numbers["longest"],
            prompt_patches=numbers["patches"] ** 2,
            prompt_frames=1,
        ),
        row_tokens=8192 if name != "tiny" else 96,
        row_sequences=8,
        microbatch_rows=1,
        patch_multiple=1,
        shared_units=len(responses) if is_shared else None,
        place="rows",
    )
    continuations = [packed_rows.Continuation(prompt=0, tokens=tokens) for tokens in responses]
    logprobs = [np.full(len(tokens), -1.0, np.float32) for tokens in responses]
    advantages = np.linspace(-1, 1, len(responses)).astype(np.float32)
    batch = policy_batch.on_policy_batch(
        [prompt], continuations, logprobs, advantages, shape, size.config
    )
    description = {"is_shared": is_shared, "microbatches": shape.num_microbatches}
    description |= {"computed_tokens": int(batch.text.tokens.size), "row_tokens": shape.row_tokens}
    description["response_tokens"] = int(sum(map(len, responses)))
    try:
        return description | _policy(size, batch, shape, numbers["longest"])
    except jax.errors.JaxRuntimeError as error:
        return description | {"error": str(error)[:500]}


def _policy(size, batch, shape, longest) -> dict[str, Any]:
    make, graphdef, params = _abstract(size, "bfloat16", sharding.REPLICATED, None)
    optimizer = _optimizer(params, "bfloat16", size.frozen)
    algorithm = policy_loss.Algorithm(
        loss="ppo",
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        aggregation="token-mean",
        norm_tokens=None,
        sampler_weights="off",
        sampler_level="token",
        sampler_low=None,
        sampler_high=None,
    )
    settings = policy_loss.Settings(
        temperature=1.0,
        max_response_tokens=longest,
        chunk_tokens=size.chunk_tokens,
        has_entropy=True,
        implementation="cudnn" if jax.default_backend() == "gpu" else "xla",
        remat="save_attention",
    )
    step = train_step.make_train_step(
        graphdef,
        lambda model, part, key: policy_loss.loss(model, part, algorithm, settings, None),
        optimizer,
        weights_fn=lambda whole: policy_loss.weights(whole, algorithm, settings, None),
        coefficients=policy_loss.coefficients(None),
        num_microbatches=shape.num_microbatches,
        shardings=None,
        compiler_options=_options(NO_TRITON),
    )
    batch, key = jax.device_put(batch), jax.random.key(1)
    compiled = step.lower(train_state.abstract_state(params, optimizer), batch, key).compile()
    held = [
        train_state.init(
            make, optimizer, jax.random.key(0), param_dtype=jnp.bfloat16, shardings=None
        )
    ]

    def run():
        held[0], metrics = compiled(held[0], batch, key)
        return metrics

    seconds = _timed(run)
    held.clear()
    median = seconds[len(seconds) // 2]
    return {"all_seconds": seconds, "seconds_a_step": median, **_memory(compiled)}
