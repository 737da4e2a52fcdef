"""How both models of alignment learn: the discriminator from its scores, then the policy."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from prism_jax import (
    discriminator_update,
    metrics,
    optim,
    policy_batch,
    segment_rows,
    train_state,
    train_step,
)
from prism_jax.continuations import RowShape
from prism_jax.stages import align_config, align_feed, align_segments, policy_rows, setup

State = dict[str, train_state.TrainState]  # "policy" and "discriminator"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """Hold what both models learn from in a step."""

    policy: policy_batch.PolicyBatch | None  # None in a step in which the policy stands still
    discriminator: segment_rows.SegmentBatch  # with the gradient of each score
    places: align_segments.Places  # where the scores stand


@dataclasses.dataclass(frozen=True, kw_only=True)
class Updates:
    """Hold how each model learns, jitted."""

    policy: train_step.TrainStep
    discriminator: train_step.TrainStep
    # (parameters, batch, places, key) -> the batch with the gradients of scores as they are now
    refresh: Callable[..., segment_rows.SegmentBatch]
    is_always_fresh: bool  # also before the first update, whose dropout the known scores had not


def update(
    updates: Updates,
    pace: align_config.Pace,
    state: State,
    learned: Learned,
    key: jax.Array,
) -> tuple[State, metrics.Metrics]:
    """Update the discriminator on (teacher, student) pairs, then the policy on its advantages."""
    discriminator, batch = state["discriminator"], learned.discriminator
    for number in range(pace.discriminator_updates):
        own_key = jax.random.fold_in(key, number)
        if number or updates.is_always_fresh:
            batch = updates.refresh(discriminator.params, batch, learned.places, own_key)
        discriminator, judged = updates.discriminator(discriminator, batch, own_key)
    # The discriminator's loss is told with its pairs; this sum only carries their gradient.
    del judged["loss/total"]
    told = _named(judged, "discriminator")
    policy = state["policy"]
    if learned.policy is None:
        skipped = jnp.copy(policy.opt_state.num_skipped_in_row)
        told["optim/policy_skipped_in_row"] = metrics.Mean(total=skipped, weight=jnp.ones(()))
        policy = dataclasses.replace(policy, step=policy.step + 1)
    else:
        policy, own = updates.policy(policy, learned.policy, key)
        told |= _named(own, "policy")
    return {"policy": policy, "discriminator": discriminator}, told


def _named(told: metrics.Metrics, owner: str) -> metrics.Metrics:
    """Say in the names of a train step's own metrics of which model they are."""
    own = ("loss/", "optim/")
    return {
        name.replace("/", f"/{owner}_", 1) if name.startswith(own) else name: metric
        for name, metric in told.items()
    }


def score_settings(
    options: align_config.Config, devices: setup.Devices
) -> discriminator_update.Settings:
    """Return how scores are computed."""
    return discriminator_update.Settings(
        implementation=devices.attention,
        remat=options.discriminator.remat,
        head_dropout=options.discriminator.head_dropout,
        score_dtype=options.discriminator.score_dtype,
    )


def open_updates(
    options: align_config.Config,
    devices: setup.Devices,
    policy: setup.Model,
    judge: setup.Model,
    shapes: align_feed.Shapes,
    *,
    key: jax.Array,
) -> tuple[dict[str, setup.Start], Updates]:
    """Return how the state of each model begins, and their updates."""
    num_steps, own = options.train.num_steps, options.discriminator
    optimizers = {
        "policy": setup.make_optimizer(options.optim, policy.params, num_steps=num_steps),
        "discriminator": setup.make_optimizer(
            own.optim, judge.params, num_steps=num_steps * options.pace.discriminator_updates
        ),
    }
    starts = {
        name: setup.start_of(model, optimizers[name], devices, key=jax.random.fold_in(key, number))
        for number, (name, model) in enumerate((("policy", policy), ("discriminator", judge)))
    }
    updates = Updates(
        policy=policy_rows.make_update(
            options.algorithm.loss(),
            policy_rows.settings(options.train, options.rollout, options.model, devices),
            policy,
            optimizers["policy"],
            starts["policy"],
            shapes.policy,
        ),
        discriminator=make_discriminator_update(
            own.rule(judge),
            score_settings(options, devices),
            judge,
            optimizers["discriminator"],
            starts["discriminator"],
            shapes.discriminator,
        ),
        refresh=make_refresh(own.rule(judge), score_settings(options, devices), judge),
        is_always_fresh=own.head_dropout > 0,
    )
    return starts, updates


def make_discriminator_update(
    rule: discriminator_update.PairRule,
    settings: discriminator_update.Settings,
    model: setup.Model,
    optimizer: optim.Optimizer,
    start: setup.Start,
    shape: RowShape,
) -> train_step.TrainStep:
    """Return the update of the discriminator by the gradients of its scores."""
    coefficients = {discriminator_update.PULLS: 1.0}

    def loss(model: nnx.Module, batch: segment_rows.SegmentBatch, key: jax.Array):
        return discriminator_update.pulled_loss(model, batch, rule.router, settings, key)

    return train_step.make_train_step(
        model.graphdef,
        loss,
        optimizer,
        weights_fn=lambda batch: discriminator_update.pulled_weights(batch, rule.router),
        coefficients=coefficients
        | ({discriminator_update.ROUTER: rule.router} if rule.router else {}),
        num_microbatches=shape.num_microbatches,
        shardings=start.shardings,
    )


def make_refresh(
    rule: discriminator_update.PairRule,
    settings: discriminator_update.Settings,
    model: setup.Model,
) -> Callable[..., segment_rows.SegmentBatch]:
    """Return the jitted function that scores a batch again, as an update of the key will."""

    def refresh(
        params: nnx.State,
        batch: segment_rows.SegmentBatch,
        places: align_segments.Places,
        key: jax.Array,
    ) -> segment_rows.SegmentBatch:
        judge = nnx.merge(model.graphdef, params)
        found = discriminator_update.all_scores(judge, batch, settings, key)
        pulls, _ = discriminator_update.pulls(found, places, rule)
        return dataclasses.replace(batch, pulls=pulls)

    return jax.jit(refresh)
