"""A step of supervised fine-tuning.

    demonstrations ─→ packed rows ─→ policy ─→ −log p of the assistant's tokens ─→ update
                                        └────→ router's load balance (experts alone) ─┘

`make_update` is the step, `make_loss` the loss of a microbatch of it.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from models import moe
from prism_jax import batches, metrics
from prism_jax.losses import reduce, sft
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.sft import config as sft_config
from prism_jax.training import optim, train_step


def make_update(
    options: sft_config.Config,
    devices: devices_lib.Devices,
    model: setup_models.Model,
    loss: train_step.LossFn,
    optimizer: optim.Optimizer,
    start: setup_models.Start,
) -> train_step.TrainStep:
    """Return the update of the policy on the packed rows of a step."""
    has_router = model.config.text.moe is not None
    return train_step.make_train_step(
        model.graphdef,
        loss,
        optimizer,
        # Of the whole step, before its first microbatch: so the split changes nothing.
        weights_fn=lambda batch: weights(batch, has_router=has_router),
        coefficients=coefficients(options.train, model),
        num_microbatches=options.microbatches(devices.layout())[0],
        shardings=start.shardings,
    )


def make_loss(options: sft_config.Config, devices: devices_lib.Devices) -> train_step.LossFn:
    """Return the loss of a microbatch: −log p of the assistant's tokens, and the router's term."""

    def loss_fn(
        model: nnx.Module, batch: batches.SFTBatch, key: jax.Array
    ) -> tuple[train_step.Terms, metrics.Metrics]:
        del key
        hidden, router = model(
            batch.text,
            batch.vision,
            implementation=devices.attention,
            remat=options.model.remat,
        )
        ids = batch.text.segments.ids
        targets, mask = sft.next_token_targets(batch.text.tokens, ids, batch.is_assistant)
        nll, logged = sft.nll(
            hidden,
            model.head(),
            targets,
            mask,
            # Logits of whole rows would not fit memory; a chunk is that of one device.
            chunk_tokens=options.train.head_chunk_tokens * devices.token_parts(),
            implementation=options.train.head,
        )
        terms = {"nll": nll}
        if router is not None:
            # Computed per microbatch, as the reference does, and weighted by its token count.
            tokens = (ids > 0).sum(dtype=jnp.float32)
            terms["load_balance"] = reduce.Sum(
                total=moe.load_balance(router) * tokens, weight=tokens
            )
            logged["router/load"] = _largest_load(router, tokens)
            logged["loss/load_balance"] = metrics.Mean(
                total=jax.lax.stop_gradient(terms["load_balance"].total), weight=tokens
            )
        return terms, logged | _packing_metrics(batch)

    return loss_fn


def weights(batch: batches.SFTBatch, *, has_router: bool) -> dict[str, jax.Array]:
    """Return the weight of each term over the whole batch, [M, B, T]."""
    ids = batch.text.segments.ids
    _, mask = jax.vmap(sft.next_token_targets)(batch.text.tokens, ids, batch.is_assistant)
    by_term = {"nll": mask.sum(dtype=jnp.float32)}
    if has_router:
        by_term["load_balance"] = (ids > 0).sum(dtype=jnp.float32)
    return by_term


def coefficients(train: sft_config.Train, model: setup_models.Model) -> dict[str, float]:
    """Return the factor of each term."""
    if model.config.text.moe is None:
        return {"nll": 1.0}
    return {"nll": 1.0, "load_balance": train.load_balance}


def _largest_load(router: moe.RouterStats, tokens: jax.Array) -> metrics.Mean:
    """Return the tokens of each layer's busiest expert over an even share, 1 at best.

    No token is ever dropped, whatever its expert is chosen for.
    """
    choices = jax.lax.stop_gradient(router.choices)  # [L, E]
    even = jnp.maximum(choices.sum(-1) / choices.shape[-1], 1.0)
    return metrics.Mean(total=(choices.max(-1) / even).mean() * tokens, weight=tokens)


def _packing_metrics(batch: batches.SFTBatch) -> metrics.Metrics:
    """Return the number of examples and the shares of padding."""
    ids, everywhere = batch.text.segments.ids, jnp.ones((), bool)
    logged = {
        "data/padding_fraction": metrics.Mean.of(ids == 0, everywhere),
        "data/examples": metrics.Sum.of(ids.max(-1), everywhere),
    }
    if batch.vision is not None:
        padding = batch.vision.segments.ids == 0
        logged["data/vision_padding_fraction"] = metrics.Mean.of(padding, everywhere)
    return logged
