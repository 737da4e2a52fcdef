"""The updates of a discriminator that learns with the policy."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import section as section_lib
from prism_jax.discriminator import step_scores, surrogate
from prism_jax.rows import RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.training import optim, train_step


def settings_of(
    section: section_lib.Discriminator, devices: devices_lib.Devices
) -> discriminator_loss.Settings:
    """Return the settings with which scores are computed."""
    return discriminator_loss.Settings(
        implementation=devices.attention,
        remat=section.remat,
        head_dropout=section.head_dropout,
        score_dtype=section.score_dtype,
        penalty=section.steadying.penalty,
    )


def make_update(
    rule: discriminator_loss.PairRule,
    settings: discriminator_loss.Settings,
    model: setup_models.Model,
    optimizer: optim.Optimizer,
    start: setup_models.Start,
    shape: RowShape,
) -> train_step.TrainStep:
    """Return the update of the discriminator by the gradients of its scores."""

    def loss(model: nnx.Module, batch: discriminator_batch.SegmentBatch, key: jax.Array):
        return surrogate.loss(model, batch, rule.router, settings, key)

    return train_step.make_train_step(
        model.graphdef,
        loss,
        optimizer,
        weights_fn=lambda batch: surrogate.weights(batch, rule.router, settings),
        coefficients=surrogate.coefficients(rule.router, settings),
        num_microbatches=shape.num_microbatches,
        shardings=start.shardings,
    )


def make_refresh(
    rule: discriminator_loss.PairRule,
    settings: discriminator_loss.Settings,
    model: setup_models.Model,
) -> Callable[..., discriminator_batch.SegmentBatch]:
    """Return the jitted function that scores a batch again, as the update of that key does."""

    def refresh(
        params: nnx.State,
        batch: discriminator_batch.SegmentBatch,
        places: step_scores.Places,
        key: jax.Array,
    ) -> discriminator_batch.SegmentBatch:
        discriminator = nnx.merge(model.graphdef, params)
        # With the update's key, so that both drop the same numbers before the head.
        scores = discriminator_loss.all_scores(discriminator, batch, settings, key)
        gradients, _ = discriminator_loss.gradients(scores, places, rule)
        return dataclasses.replace(batch, score_gradients=gradients)

    return jax.jit(refresh)
