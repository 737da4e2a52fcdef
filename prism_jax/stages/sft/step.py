"""A step of supervised fine-tuning: its loss, weights and coefficients."""

import functools

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
    optimizer: optim.Optimizer,
    start: setup_models.Start,
    loss_fn: train_step.LossFn,
) -> train_step.TrainStep:
    """Return the update of the policy."""
    return train_step.make_train_step(
        model.graphdef,
        loss_fn,
        optimizer,
        weights_fn=functools.partial(weights, has_router=model.config.text.moe is not None),
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
        nll, told = sft.nll(
            hidden,
            model.head(),
            targets,
            mask,
            chunk_tokens=options.train.head_chunk_tokens * devices.row_parts(),
            implementation=options.train.head,
        )
        terms = {"nll": nll}
        if router is not None:
            # Of each microbatch by itself, as in the reference, weighted by its tokens.
            tokens = (ids > 0).sum(dtype=jnp.float32)
            terms["load_balance"] = reduce.Sum(
                total=moe.load_balance(router) * tokens, weight=tokens
            )
            told["loss/load_balance"] = metrics.Mean(
                total=jax.lax.stop_gradient(terms["load_balance"].total), weight=tokens
            )
        everywhere = jnp.ones((), bool)
        told["data/padding_fraction"] = metrics.Mean.of(ids == 0, everywhere)
        told["data/examples"] = metrics.Sum.of(ids.max(-1), everywhere)
        if batch.vision is not None:
            padding = batch.vision.segments.ids == 0
            told["data/vision_padding_fraction"] = metrics.Mean.of(padding, everywhere)
        return terms, told

    return loss_fn


def weights(batch: batches.SFTBatch, *, has_router: bool) -> dict[str, jax.Array]:
    """Return the weight of each term over the whole batch, [M, B, T]."""
    ids = batch.text.segments.ids
    _, mask = jax.vmap(sft.next_token_targets)(batch.text.tokens, ids, batch.is_assistant)
    found = {"nll": mask.sum(dtype=jnp.float32)}
    if has_router:
        found["load_balance"] = (ids > 0).sum(dtype=jnp.float32)
    return found


def coefficients(train: sft_config.Train, model: setup_models.Model) -> dict[str, float]:
    """Return the factor of each term."""
    if model.config.text.moe is None:
        return {"nll": 1.0}
    return {"nll": 1.0, "load_balance": train.load_balance}
