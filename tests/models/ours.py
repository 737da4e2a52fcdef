"""What our model computes on the cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import config as config_lib
from models import inputs, moe, qwen3_vl, sharding
from tests.models import cases, weights


@functools.cache
def model(
    case: str, moe_implementation: str = "dense", rules: sharding.Rules = sharding.REPLICATED
) -> tuple[nnx.GraphDef, nnx.State]:
    """Build the model of `cases.CONFIGS` with the weights that its names decide."""
    config_json = cases.CONFIGS[case]
    config = config_lib.from_hf(config_json)
    graphdef, abstract = qwen3_vl.abstract(
        lambda: qwen3_vl.Qwen3VL(
            config,
            has_head=True,
            moe_implementation=moe_implementation if config.text.moe else None,
            rules=rules,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    return graphdef, weights.fill(abstract, config_json, cases.weight)


def loss(graphdef, params, batch: cases.Batch, cotangent, remat: str):
    """Return the scalar of `reference.forward`, and what is compared."""
    built = nnx.merge(graphdef, params)
    hidden, stats = built(batch.text, batch.vision, implementation="xla", remat=remat)
    logits = built.logits(hidden)
    total = jnp.where(batch.text.segments.ids[..., None] > 0, logits * cotangent, 0).sum()
    told = {"hidden": hidden, "logits": logits}
    if stats is not None:
        told["load_balance"] = moe.load_balance(stats)
        total += 10 * told["load_balance"]
    return total, told


@functools.partial(jax.jit, static_argnames=("graphdef", "remat"))
def _grad(graphdef, params, batch, cotangent, remat):
    return jax.grad(loss, argnums=1, has_aux=True)(graphdef, params, batch, cotangent, remat)


def forward(
    case: str,
    rows: list[inputs.Example],
    name: str,
    *,
    remat: str = "none",
    moe_implementation: str = "dense",
) -> dict:
    """Return the same as `reference.forward`, a row per example."""
    graphdef, params = model(case, moe_implementation)
    built = nnx.merge(graphdef, params)
    batch = cases.batch([[row] for row in rows], built.config)
    cotangent = cases.cotangent(name, (*batch.text.tokens.shape, cases.VOCAB))
    gradients, told = _grad(graphdef, params, batch, cotangent, remat)
    found = {key: np.asarray(value) for key, value in told.items()}
    return found | {"gradients": weights.by_name(gradients, cases.CONFIGS[case])}


def greedy(case: str, rows: list[inputs.Example], num_tokens: int) -> np.ndarray:
    """Return int[B, num_tokens], the most likely tokens one by one, from one prefill."""
    graphdef, params = model(case)
    built = nnx.merge(graphdef, params)
    built.text.unstack()
    batch = cases.batch([[row] for row in rows], built.config)

    @jax.jit
    def prefill(built, batch):
        images = None
        if batch.vision is not None:
            images = built.encode_images(batch.vision, implementation="xla", remat=False)
        hidden, cache = built.prefill(batch.text, images, implementation="xla", cache_length=128)
        return built.logits(hidden).argmax(-1), cache

    @jax.jit
    def step(built, tokens, cache):
        hidden, cache = built.decode_step(tokens, cache, implementation="xla")
        return built.logits(hidden).argmax(-1), cache

    tokens, cache = prefill(built, batch)
    found = [tokens]
    for _ in range(num_tokens - 1):
        tokens, cache = step(built, tokens.astype(jnp.int32), cache)
        found.append(tokens)
    return np.stack(found, 1)
