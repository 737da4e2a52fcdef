"""How both models of alignment learn: the discriminator from its scores, then the policy."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import update as policy_update
from prism_jax.rows import RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.align import config as align_config
from prism_jax.stages.align import feed as align_feed
from prism_jax.stages.align import segments as align_segments
from prism_jax.training import optim, train_state, train_step

State = dict[str, train_state.TrainState]  # "policy" and "discriminator"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """Hold what both models learn from in a step."""

    policy: policy_batch.PolicyBatch | None  # None in a step in which the policy stands still
    discriminator: discriminator_batch.SegmentBatch  # with the gradient of each score
    places: align_segments.Places  # where the scores stand


@dataclasses.dataclass(frozen=True, kw_only=True)
class Updates:
    """Hold how each model learns, jitted."""

    policy: train_step.TrainStep
    discriminator: train_step.TrainStep
    # (parameters, batch, places, key) -> the batch with the gradients of scores as they are now
    refresh: Callable[..., discriminator_batch.SegmentBatch]
    is_always_fresh: bool  # also before the first update, whose dropout the known scores had not


def score_settings(
    options: align_config.Config, devices: devices_lib.Devices
) -> discriminator_loss.Settings:
    """Return how scores are computed."""
    return discriminator_loss.Settings(
        implementation=devices.attention,
        remat=options.discriminator.remat,
        head_dropout=options.discriminator.head_dropout,
        score_dtype=options.discriminator.score_dtype,
    )


def open_updates(
    options: align_config.Config,
    devices: devices_lib.Devices,
    policy: setup_models.Model,
    discriminator: setup_models.Model,
    shapes: align_feed.Shapes,
    *,
    key: jax.Array,
) -> tuple[dict[str, setup_models.Start], Updates]:
    """Return how the state of each model begins, and their updates."""
    num_steps, own = options.train.num_steps, options.discriminator
    optimizers = {
        "policy": setup_models.make_optimizer(options.optim, policy.params, num_steps=num_steps),
        "discriminator": setup_models.make_optimizer(
            own.optim,
            discriminator.params,
            num_steps=num_steps * options.pace.discriminator_updates,
        ),
    }
    starts = {
        name: setup_models.start_of(
            model, optimizers[name], devices, key=jax.random.fold_in(key, number)
        )
        for number, (name, model) in enumerate(
            (("policy", policy), ("discriminator", discriminator))
        )
    }
    updates = Updates(
        policy=policy_update.make_update(
            options.algorithm.loss(),
            policy_update.settings(options.train, options.rollout, options.model, devices),
            policy,
            optimizers["policy"],
            starts["policy"],
            shapes.policy,
        ),
        discriminator=make_discriminator_update(
            own.rule(discriminator),
            score_settings(options, devices),
            discriminator,
            optimizers["discriminator"],
            starts["discriminator"],
            shapes.discriminator,
        ),
        refresh=make_refresh(
            own.rule(discriminator), score_settings(options, devices), discriminator
        ),
        is_always_fresh=own.head_dropout > 0,
    )
    return starts, updates


def make_discriminator_update(
    rule: discriminator_loss.PairRule,
    settings: discriminator_loss.Settings,
    model: setup_models.Model,
    optimizer: optim.Optimizer,
    start: setup_models.Start,
    shape: RowShape,
) -> train_step.TrainStep:
    """Return the update of the discriminator by the gradients of its scores."""
    coefficients = {discriminator_loss.PULLS: 1.0}

    def loss(model: nnx.Module, batch: discriminator_batch.SegmentBatch, key: jax.Array):
        return discriminator_loss.pulled_loss(model, batch, rule.router, settings, key)

    return train_step.make_train_step(
        model.graphdef,
        loss,
        optimizer,
        weights_fn=lambda batch: discriminator_loss.pulled_weights(batch, rule.router),
        coefficients=coefficients
        | ({discriminator_loss.ROUTER: rule.router} if rule.router else {}),
        num_microbatches=shape.num_microbatches,
        shardings=start.shardings,
    )


def make_refresh(
    rule: discriminator_loss.PairRule,
    settings: discriminator_loss.Settings,
    model: setup_models.Model,
) -> Callable[..., discriminator_batch.SegmentBatch]:
    """Return the jitted function that scores a batch again, as an update of the key will."""

    def refresh(
        params: nnx.State,
        batch: discriminator_batch.SegmentBatch,
        places: align_segments.Places,
        key: jax.Array,
    ) -> discriminator_batch.SegmentBatch:
        discriminator = nnx.merge(model.graphdef, params)
        found = discriminator_loss.all_scores(discriminator, batch, settings, key)
        pulls, _ = discriminator_loss.pulls(found, places, rule)
        return dataclasses.replace(batch, pulls=pulls)

    return jax.jit(refresh)
