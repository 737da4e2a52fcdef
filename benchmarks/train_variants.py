"""The variants of the SFT update that `benchmarks.train_step` times."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import train_cases
from models import attention, qwen3_vl, sharding
from prism_jax import batches, metrics
from prism_jax.losses import reduce, sft
from prism_jax.training import optim, optim_kinds, schedules, train_state, train_step

OPTIONS = {
    "default": {},
    "no_triton": {"xla_gpu_enable_triton_gemm": False},
    "untuned": {"xla_gpu_autotune_level": 0},
    "untuned_no_triton": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
}
# What is computed: the update, loss and gradients, or the loss.
_PROGRAMS = {"no_optimizer": "gradient", "no_head": "gradient"} | {
    "forward": "loss",
    "forward_no_head": "loss",
}
ABLATIONS = (
    *("forward", "no_optimizer", "no_deepstack", "no_vision", "no_head", "forward_no_head"),
    *("xla_attention", "recompute_head", "remat_full", "remat_attention"),
)
State = train_state.TrainState
Batch = batches.SFTBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One variant: its computation, and how it is compiled."""

    size: train_cases.Size
    program: str  # "update", "gradient" or "loss"
    options: dict[str, bool | int | str]
    implementation: attention.Implementation
    head: str | None  # of `sft.nll`; None: no head
    has_deepstack: bool
    dtype: jnp.dtype


def case_of(variant: str, size: train_cases.Size, *, ablate: str, dtype: jnp.dtype) -> Case:
    """Return the variant of a name."""
    on_gpu = jax.default_backend() == "gpu"
    remat = {"remat_full": "full", "remat_attention": "save_attention"}.get(variant, size.remat)
    use_cudnn = on_gpu and dtype != jnp.float32 and variant != "xla_attention"
    head = "recompute" if variant == "recompute_head" else "fused"
    return Case(
        size=dataclasses.replace(size, remat=remat),
        program=_PROGRAMS.get(variant, "update"),
        options=OPTIONS.get(variant, OPTIONS[ablate]),
        implementation="cudnn" if use_cudnn else "xla",
        head=None if variant.endswith("no_head") else head,
        has_deepstack=variant != "no_deepstack",
        dtype=dtype,
    )


def make_model(size: train_cases.Size, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    """Make the policy with random float32 weights."""
    return qwen3_vl.Qwen3VL(
        size.config,
        has_head=True,
        moe_implementation=None,
        rules=sharding.REPLICATED,
        dtype=dtype,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


def make_optimizer(size: train_cases.Size, params: nnx.State) -> optim.Optimizer:
    """Return AdamW with the settings of configs/sft.py."""
    schedule = schedules.learning_rate_schedule(
        "cosine",
        peak=1e-5,
        num_steps=1000,
        warmup_steps=None,
        warmup_fraction=0.1,
        end_factor=0.0,
    )
    return optim.make(
        params,
        kind="adamw",
        numbers=optim_kinds.Numbers(
            b1=0.9, b2=0.999, eps=1e-8, mu_dtype="float32", nu_dtype="float32"
        ),
        schedule=schedule,
        weight_decay=0.0,
        no_decay=(".*/scale", ".*/bias"),
        groups=(*((pattern, None) for pattern in size.frozen), (".*", 1.0)),
        clip_norm=1.0,
        rounding="nearest",
        memory="device",
    )


def loss_fn(
    case: Case, model: nnx.Module, batch: Batch, key: jax.Array
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return the loss of a microbatch, as the stage computes it unless the case says otherwise."""
    del key
    how = {"implementation": case.implementation}
    remat = case.size.remat
    images = None
    if batch.vision is not None:
        images = model.encode_images(batch.vision, remat=remat != "none", **how)
    if images is not None and not case.has_deepstack:
        images = (images[0], None)
    x, levels = model.embed(batch.text, images)
    segments = batch.text.segments
    hidden, _ = model.text(x, batch.text.positions, segments, levels, remat=remat, **how)
    targets, mask = sft.next_token_targets(batch.text.tokens, segments.ids, batch.is_assistant)
    if case.head is None:
        total = jnp.where(mask[..., None], hidden, 0).astype(jnp.float32).sum()
        return {"nll": reduce.Sum(total=total, weight=mask.sum(dtype=jnp.float32))}, {}
    term, logged = sft.nll(
        hidden,
        model.head(),
        targets,
        mask,
        chunk_tokens=case.size.chunk_tokens,
        implementation=case.head,
    )
    return {"nll": term}, logged


def weights(batch: Batch) -> dict[str, jax.Array]:
    """Return the number of targets, as the stage does."""
    ids = batch.text.segments.ids
    _, mask = jax.vmap(sft.next_token_targets)(batch.text.tokens, ids, batch.is_assistant)
    return {"nll": mask.sum(dtype=jnp.float32)}


def program_of(case: Case) -> tuple[Callable, optim.Optimizer, State]:
    """Return the jitted (state, batch, key) -> anything, its optimizer and the abstract state."""
    graphdef, params = train_state.abstract_params(
        functools.partial(make_model, case.size, case.dtype), param_dtype=jnp.float32
    )
    optimizer = make_optimizer(case.size, params)
    abstract = train_state.abstract_state(params, optimizer)
    if case.program == "update":
        step = train_step.make_train_step(
            graphdef,
            functools.partial(loss_fn, case),
            optimizer,
            weights_fn=weights,
            coefficients={"nll": 1.0},
            num_microbatches=1,
            shardings=None,
            compiler_options=case.options,
        )
        return step, optimizer, abstract

    def loss(trainable: nnx.State, frozen: nnx.State, batch: Batch, key: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, trainable, frozen)
        terms, _ = loss_fn(case, model, jax.tree.map(lambda x: x[0], batch), key)
        return terms["nll"].total / terms["nll"].weight

    run = loss if case.program == "loss" else jax.value_and_grad(loss)

    def parts(state: State, batch: Batch, key: jax.Array) -> Any:
        return run(*optimizer.split(state.params), batch, key)

    return jax.jit(parts, compiler_options=case.options), optimizer, abstract


def make_state(case: Case, optimizer: optim.Optimizer) -> State:
    """Make random weights and the optimizer's zeros on the device."""
    return train_state.init(
        functools.partial(make_model, case.size, case.dtype),
        optimizer,
        jax.random.key(0),
        param_dtype=jnp.float32,
        shardings=None,
    )
