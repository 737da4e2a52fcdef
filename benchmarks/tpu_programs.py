"""The programs that are compiled for TPU topologies, with abstract arguments: no array is made."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import tpu_rollout
from models import discriminator, inputs, moe, presets, qwen3_vl, sharding, text
from models.config import Qwen3VLConfig
from prism_jax import mesh as mesh_lib
from prism_jax import metrics
from prism_jax.losses import logprob, reduce, sft
from prism_jax.training import optim, optim_kinds, train_state, train_step

# forward: log-prob of every next token, or scores; gradient: of the loss; train: gradient and AdamW
# in place; decode: one token a slot, 16 slots a prompt.
PROGRAMS = ("forward", "gradient", "train", "decode")
# Static segments of a row, of text and of patches.
MAX_SEGMENTS = 16

Tree = Any
Array = Callable[..., jax.ShapeDtypeStruct]
Program = tuple[jax.stages.Wrapped, tuple]  # the jitted function and its abstract arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Name one compilation."""

    model: str
    topology: str
    program: str
    mesh: str  # sizes of the axes that are not 1, e.g. "fsdp=-1"
    row_tokens: int  # of a packed row; "decode": places of a slot
    row_patches: int  # of a packed row; "decode": places of a prompt
    rows: int  # text rows, and vision rows, or slots per shard of the axes data and fsdp
    chunk_tokens: int  # of one shard, that go through the output head at a time
    moe_implementation: str | None


def _small(vision_head_dim: int, taps: tuple[int, ...]) -> Qwen3VLConfig:
    """Return a small model whose heads have the sizes of the published ones."""
    text_part = dataclasses.replace(
        presets.QWEN3_VL_2B.text,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
    )
    vision_part = dataclasses.replace(
        presets.TINY.vision,
        hidden_size=2 * vision_head_dim,
        num_layers=2,
        num_heads=2,
        out_hidden_size=256,
        deepstack_layers=taps,
    )
    return dataclasses.replace(presets.TINY, text=text_part, vision=vision_part)


MODELS = {
    "small_64": _small(64, taps=(0,)),
    "small_72": _small(72, taps=()),
    "2b": presets.QWEN3_VL_2B,
    "4b": presets.QWEN3_VL_4B,
    "8b": presets.QWEN3_VL_8B,
    "30b_a3b": presets.QWEN3_VL_30B_A3B,
    "discriminator": presets.DISCRIMINATOR_2B_MOE4X,
}


def topology_mesh(topology: str, axes: str) -> Mesh:
    """Return the mesh over the chips of a described topology."""
    # Both are read when libtpu is loaded: other processes may hold it, and there is no cloud.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    sizes = dict.fromkeys(mesh_lib.AXES, 1)
    for pair in axes.split(","):
        name, size = pair.split("=")
        sizes[name] = int(size)
    return mesh_lib.make(sizes, devices)


def placed(mesh: Mesh, rules: sharding.Rules) -> Array:
    """Return a maker of shapes, (shape, dtype, *logical axes), that lie on the mesh."""

    def make(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        layout = NamedSharding(mesh, sharding.spec(rules, *axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

    return make


def abstract_batch(case: Case, lead: tuple[int, ...], rows: int, array: Array) -> Tree:
    """Return a text row and a vision row for each of `rows`, as shapes.

    Args:
      lead: leading sizes of every array, the microbatches of a train step.
    """
    vision, none = MODELS[case.model].vision, (None,) * len(lead)

    def packed(length: int, *last: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return array((*lead, rows, length, *last), dtype, *none, "batch")

    def segments(length: int) -> inputs.Segments:
        return inputs.Segments(
            ids=packed(length), lengths=packed(MAX_SEGMENTS), offsets=packed(MAX_SEGMENTS + 1)
        )

    tokens, patches = case.row_tokens, case.row_patches
    return {
        "is_assistant": packed(tokens, dtype=np.bool_),
        "text": inputs.TextInput(
            tokens=packed(tokens),
            positions=array((*lead, 3, rows, tokens), np.int32, *none, None, "batch"),
            image_slots=packed(tokens),
            segments=segments(tokens),
        ),
        "vision": inputs.VisionInput(
            pixels=packed(patches, vision.patch_dim, dtype=np.uint8),
            coords=packed(patches, 2),
            corners=packed(patches, 4),
            corner_weights=packed(patches, 4, dtype=np.float32),
            segments=segments(patches),
        ),
    }


def _maker(case: Case, rules: sharding.Rules) -> train_state.MakeModel:
    config = MODELS[case.model]
    common = {
        "moe_implementation": case.moe_implementation,
        "rules": rules,
        "dtype": jnp.bfloat16,
        "param_dtype": jnp.bfloat16,
    }

    def make(rngs: nnx.Rngs) -> nnx.Module:
        if case.model == "discriminator":
            return discriminator.Discriminator(config, **common, rngs=rngs)
        return qwen3_vl.Qwen3VL(config, has_head=True, **common, rngs=rngs)

    return make


def abstract_model(case: Case, mesh: Mesh, rules: sharding.Rules) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the graph and the parameters as shapes with their shardings.

    Gradients are of float32 parameters; what needs none reads bfloat16 ones.
    """
    dtype = jnp.float32 if case.program in ("gradient", "train") else jnp.bfloat16
    return _abstract(_maker(case, rules), dtype, mesh, rules)


def abstract_sampler(case: Case, mesh: Mesh, rules: sharding.Rules) -> tpu_rollout.Sampler:
    """Return the model after `rollout.serving.prepare`, as shapes with their shardings."""
    make, config = _maker(case, rules), MODELS[case.model]

    def make_apart(rngs: nnx.Rngs) -> nnx.Module:
        model = make(rngs)
        model.text.unstack()
        return model

    graphdef, params = _abstract(make_apart, jnp.bfloat16, mesh, rules)
    return tpu_rollout.Sampler(
        graphdef=graphdef, params=params, config=config, mesh=mesh, rules=rules
    )


def _abstract(
    make: train_state.MakeModel, dtype: Any, mesh: Mesh, rules: sharding.Rules
) -> tuple[nnx.GraphDef, nnx.State]:
    graphdef, params = train_state.abstract_params(make, param_dtype=dtype)

    def one(param: nnx.Variable) -> nnx.Variable:
        axes = param.get_metadata("axes")
        return param.replace(placed(mesh, rules)(param.shape, param.dtype, *axes))

    return graphdef, jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def score_loss(built: nnx.Module, batch: Tree, remat: text.Remat) -> jax.Array:
    """Return the pairwise loss of neighbouring segments' scores, with the load-balance term."""
    row = batch["text"]
    last = jnp.maximum(row.segments.offsets[:, 1:] - 1, 0)
    scores, stats = built(row, batch["vision"], last, implementation="splash", remat=remat)
    return jax.nn.softplus(scores[:, 1::2] - scores[:, 0::2]).sum() + moe.load_balance(stats)


def token_loss(
    built: nnx.Module, batch: Tree, chunk_tokens: int
) -> tuple[reduce.Sum, metrics.Metrics]:
    """Return the negative log-likelihood of the assistant's tokens."""
    row = batch["text"]
    hidden, _ = built(row, batch["vision"], implementation="splash", remat="full")
    targets, mask = sft.next_token_targets(row.tokens, row.segments.ids, batch["is_assistant"])
    return sft.nll(
        hidden,
        built.head(),
        targets,
        mask,
        chunk_tokens=chunk_tokens,
        implementation="recompute",
    )


def token_logprobs(built: nnx.Module, batch: Tree, chunk_tokens: int) -> jax.Array:
    """Return the log-prob of each next token, as the scoring of a rollout needs it."""
    row = batch["text"]
    hidden, _ = built(row, batch["vision"], implementation="splash", remat="none")
    logprobs, _ = logprob.token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        built.head(),
        jnp.roll(row.tokens, -1, axis=1).reshape(-1),
        temperature=1.0,
        chunk_tokens=chunk_tokens,
        with_entropy=False,
    )
    return logprobs.reshape(row.tokens.shape)


def _train_program(
    case: Case, mesh: Mesh, rules: sharding.Rules, rows: int, chunk_tokens: int
) -> Program:
    """Return one supervised step with float32 parameters and moments, one microbatch."""
    graphdef, params = train_state.abstract_params(_maker(case, rules), param_dtype=jnp.float32)
    optimizer = optim.make(
        params,
        kind="adamw",
        numbers=optim_kinds.Numbers(
            b1=0.9, b2=0.95, eps=1e-8, mu_dtype="float32", nu_dtype="float32"
        ),
        schedule=lambda step: jnp.full((), 1e-5),
        weight_decay=0.0,
        no_decay=(),
        groups=((".*", 1.0),),
        clip_norm=1.0,
        rounding="nearest",
        memory="device",
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = train_state.abstract_state(params, optimizer)
    layouts = train_state.shardings(
        abstract,
        of_params=lambda tree: mesh_lib.param_shardings(tree, mesh, rules),
        replicated=replicated,
    )

    def loss_fn(built: nnx.Module, batch: Tree, key: jax.Array) -> tuple:
        term, logged = token_loss(built, batch, chunk_tokens)
        return {"nll": term}, logged

    step = train_step.make_train_step(
        graphdef,
        loss_fn,
        optimizer,
        weights_fn=lambda batch: {"nll": batch["is_assistant"].sum(dtype=jnp.float32)},
        coefficients={"nll": 1.0},
        num_microbatches=1,
        shardings=layouts,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = abstract_batch(case, (1,), rows, placed(mesh, rules))
    return step, (train_state.with_shardings(abstract, layouts), batch, key)


def program(case: Case, mesh: Mesh) -> Program:
    """Return the jitted function of a case and its abstract arguments."""
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows, chunk_tokens = case.rows * shards, case.chunk_tokens * shards * mesh.shape["sequence"]
    if case.program == "decode":
        sizes = tpu_rollout.plan(
            parts=shards,
            slots=case.rows,
            places=case.row_tokens,
            prompt_places=case.row_patches,
            width=min(case.rows, 16),
        )
        return tpu_rollout.decode_program(abstract_sampler(case, mesh, rules), sizes)
    if case.program == "train":
        return _train_program(case, mesh, rules, rows, chunk_tokens)
    graphdef, params = abstract_model(case, mesh, rules)
    arguments = (params, abstract_batch(case, (), rows, placed(mesh, rules)))
    has_gradient = case.program == "gradient"

    def run(params: nnx.State, batch: Tree) -> jax.Array:
        built = nnx.merge(graphdef, params)
        if case.model == "discriminator":
            return score_loss(built, batch, "full" if has_gradient else "none")
        if has_gradient:
            return token_loss(built, batch, chunk_tokens)[0].total
        return token_logprobs(built, batch, chunk_tokens)

    if not has_gradient:
        return jax.jit(run), arguments
    layouts = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(jax.value_and_grad(run), out_shardings=(None, layouts)), arguments
