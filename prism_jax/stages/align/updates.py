"""The updates of both models of alignment, and the beginnings of their states."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prism_jax import metrics
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import step_scores
from prism_jax.discriminator import updates as discriminator_updates
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import distill as policy_distill
from prism_jax.policy import update as policy_update
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.align import config as align_config
from prism_jax.stages.align import feed as align_feed
from prism_jax.stages.align import mean_weights
from prism_jax.training import optim, train_state, train_step

# "policy" and "discriminator", and with a mean of weights "mean_discriminator", its parameters
State = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The batches of a step for both updates."""

    # With an open teacher within `train_step.WithShared`; None: the policy stands still.
    policy: policy_batch.PolicyBatch | train_step.WithShared | None
    discriminator: discriminator_batch.SegmentBatch  # with the gradient of each score
    places: step_scores.Places  # of each score in the batch
    # False in a step whose pair accuracy is high enough already, see `pace`.
    has_discriminator_update: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Updates:
    """The jitted updates of both models."""

    policy: train_step.TrainStep
    discriminator: train_step.TrainStep
    # (parameters, batch, places, key) -> the batch with the gradients of scores as they are now
    refresh: Callable[..., discriminator_batch.SegmentBatch]
    # Refresh before the first update too: the scores at hand were computed without its dropout.
    is_always_fresh: bool
    # (mean, parameters) -> mean of the discriminator's weights; None: there is no mean
    average: Callable[[nnx.State, nnx.State], nnx.State] | None = None


def score_settings(
    options: align_config.Config, devices: devices_lib.Devices
) -> discriminator_loss.Settings:
    """Return the settings with which scores are computed."""
    return discriminator_updates.settings_of(options.discriminator, devices)


def optimizer_of(options: align_config.Config, model: setup_models.Model) -> optim.Optimizer:
    """Return the optimizer of one of the models; its schedule counts the updates of that model."""
    section, num_steps = options.optim, options.train.num_steps
    if model.is_discriminator:
        section = options.discriminator.optim
        num_steps *= options.pace.discriminator_updates
    return setup_models.make_optimizer(section, model.params, num_steps=num_steps)


def open_updates(
    options: align_config.Config,
    devices: devices_lib.Devices,
    policy: setup_models.Model,
    discriminator: setup_models.Model,
    shapes: align_feed.Shapes,
    teacher: policy_distill.Teacher | None = None,
    *,
    key: jax.Array,
) -> tuple[dict[str, setup_models.Start], Updates]:
    """Return the beginning of each model's state, and the updates."""
    rule = options.discriminator.rule(discriminator)
    settings = score_settings(options, devices)
    optimizers = {
        "policy": optimizer_of(options, policy),
        "discriminator": optimizer_of(options, discriminator),
    }
    starts = {
        # Two new models of one size must not start from the same weights.
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
            teaching=policy_distill.teaching_of(options.distill, teacher),
        ),
        discriminator=discriminator_updates.make_update(
            rule,
            settings,
            discriminator,
            optimizers["discriminator"],
            starts["discriminator"],
            shapes.discriminator,
        ),
        refresh=discriminator_updates.make_refresh(rule, settings, discriminator),
        is_always_fresh=options.discriminator.head_dropout > 0,
        average=mean_weights.make_average(options.discriminator.steadying.ema_decay),
    )
    return starts, updates


def skip_policy(
    policy: train_state.TrainState,
) -> tuple[train_state.TrainState, metrics.Metrics]:
    """Return the policy after a step in which it stands still: only the step is counted."""
    return dataclasses.replace(policy, step=policy.step + 1), of_skipped(policy)


def of_skipped(state: train_state.TrainState) -> metrics.Metrics:
    """Return the metrics of a step in which a model stands still."""
    # A copy, because the next update donates the state, and metrics are read after that.
    skipped = jnp.copy(state.opt_state.num_skipped_in_row)
    return {"optim/skipped_in_row": metrics.Mean(total=skipped, weight=jnp.ones(()))}


def with_owner(logged: metrics.Metrics, owner: str) -> metrics.Metrics:
    """Prefix the metrics of the train step with the model's name."""
    # Both updates log these, and a metric may stand in a row only once.
    prefixes = ("loss/", "optim/")
    return {
        name.replace("/", f"/{owner}_", 1) if name.startswith(prefixes) else name: metric
        for name, metric in logged.items()
    }
