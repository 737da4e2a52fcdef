"""A step of the warm-up.

    prompt ─→ teacher's segment ─┐
       │                         ├─→ discriminator ─→ scores ─→ −log σ(teacher − student) ─→ update
       └───→ student's segment ──┘         └────→ router's load balance (experts alone) ───────┘

`make_update` is the step. Both segments of a pair lie in one packed row, and the loss is a mean
over the pairs of every name, see `discriminator.loss.pair_loss`.
"""

import functools

import jax
from flax import nnx

from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.rows import RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.warmup import config as warmup_config
from prism_jax.training import optim, train_step


def make_update(
    options: warmup_config.Config,
    devices: devices_lib.Devices,
    model: setup_models.Model,
    optimizer: optim.Optimizer,
    start: setup_models.Start,
    shape: RowShape,
) -> train_step.TrainStep:
    """Return the update of the discriminator on the pairs of a step.

    Source: PRISM moe/train_moe_vl_warmup_fast.py:465-475.
    """
    names, rule = options.data.form.names, options.pairs.rule(model)
    settings = score_settings(options, devices)

    def loss(model: nnx.Module, batch: discriminator_batch.SegmentBatch, key: jax.Array):
        return discriminator_loss.pair_loss(model, batch, names, rule, settings, key)

    return train_step.make_train_step(
        model.graphdef,
        loss,
        optimizer,
        # Of the whole step, before its first microbatch: so the split changes nothing.
        weights_fn=functools.partial(discriminator_loss.pair_weights, names=names, rule=rule),
        # A mean over the names, while alignment adds them up: both as released.
        coefficients=rule.coefficients(names, of_segment=1 / len(names)),
        num_microbatches=shape.num_microbatches,
        shardings=start.shardings,
    )


def score_settings(
    options: warmup_config.Config, devices: devices_lib.Devices
) -> discriminator_loss.Settings:
    """Return the settings with which scores are computed."""
    return discriminator_loss.Settings(
        implementation=devices.attention,
        remat=options.model.remat,
        head_dropout=options.pairs.head_dropout,
        score_dtype=options.pairs.score_dtype,
    )
