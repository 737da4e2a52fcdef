"""A step of the warm-up."""

import functools
from collections.abc import Sequence

import jax
from flax import nnx

from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.honesty import asker as honesty_asker
from prism_jax.rows import RowShape
from prism_jax.running import loop
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.warmup import config as warmup_config
from prism_jax.stages.warmup import feed as warmup_feed
from prism_jax.stages.warmup import honesty as warmup_honesty
from prism_jax.training import optim, train_step


def make_evaluation(
    options: warmup_config.Config,
    feed: warmup_feed.Feed,
    model: setup_models.Model,
    devices: devices_lib.Devices,
    settings: discriminator_loss.Settings,
    shape: RowShape,
    *,
    num_steps: int,
) -> warmup_honesty.Evaluate | None:
    """Return what is measured on held-out pairs: accuracies, and the honesty panel."""
    score = discriminator_loss.make_scorer(model.graphdef, settings)
    layout = honesty_asker.Layout(
        shape=shape,
        positions="mrope",
        is_paired=True,
        batch_pairs=options.train.num_pairs * len(feed.names),
        sees_images=options.data.sees_images,
    )
    return warmup_honesty.beside(
        feed.evaluation(score, shape, devices, num_batches=options.evaluate.num_batches),
        feed,
        honesty_asker.Asker(model, devices, settings, score, layout),
        options.honesty,
        evaluate_every_steps=options.evaluate.every_steps,
        num_steps=num_steps,
    )


def settings(
    options: warmup_config.Config, devices: devices_lib.Devices
) -> discriminator_loss.Settings:
    """Return how the discriminator is computed."""
    return discriminator_loss.Settings(
        implementation=devices.attention,
        remat=options.model.remat,
        head_dropout=options.pairs.head_dropout,
        score_dtype=options.pairs.score_dtype,
    )


def make_stage(
    options: warmup_config.Config,
    devices: devices_lib.Devices,
    model: setup_models.Model,
    feed: warmup_feed.Feed,
    optimizer: optim.Optimizer,
    start: setup_models.Start,
    shape: RowShape,
    *,
    num_steps: int,
) -> loop.Stage:
    """Return what is done in a step, and how held-out pairs are measured."""
    own_settings = settings(options, devices)
    names = options.data.form.names
    return loop.Stage(
        experience=loop.learn_from_data,
        update=make_update(
            options.pairs.rule(model), names, own_settings, model, optimizer, start, shape
        ),
        evaluate=make_evaluation(
            options, feed, model, devices, own_settings, shape, num_steps=num_steps
        ),
        skip_counters=("optim/skipped_in_row",),
    )


def make_update(
    rule: discriminator_loss.PairRule,
    names: Sequence[str],
    settings: discriminator_loss.Settings,
    model: setup_models.Model,
    optimizer: optim.Optimizer,
    start: setup_models.Start,
    shape: RowShape,
) -> train_step.TrainStep:
    """Return the update of the discriminator: its loss is a mean over pairs of any name.

    Source: PRISM moe/train_moe_vl_warmup_fast.py:465-475.
    """

    def loss(model: nnx.Module, batch: discriminator_batch.SegmentBatch, key: jax.Array):
        return discriminator_loss.pair_loss(model, batch, names, rule, settings, key)

    return train_step.make_train_step(
        model.graphdef,
        loss,
        optimizer,
        weights_fn=functools.partial(discriminator_loss.pair_weights, names=names, rule=rule),
        coefficients=rule.coefficients(names, of_segment=1 / len(names)),
        num_microbatches=shape.num_microbatches,
        shardings=start.shardings,
    )
