"""The updates that follow a rollout: one, strictly on-policy, or several over parts of it.

    rollout   prompts a b c d e f      num_minibatches 3, num_epochs 2
    updates   a b | c d | e f | a b | c d | e f

Each part is a batch with denominators of its own. Several updates have a ratio to the policy before
the first of them; see `policy_update`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from prism_jax import metrics, optim, policy_batch, train_state, train_step
from prism_jax.continuations import RowShape
from prism_jax.data import encode
from prism_jax.stages import policy_rows, rlvr_config, setup

# Of the optimiser's counts the last one and the largest are told, not a mean.
_LAST, _LARGEST = "optim/skipped_updates", "optim/skipped_in_row"

Batches = tuple[policy_batch.PolicyBatch, ...]
Update = Callable[
    [train_state.TrainState, Batches, jax.Array], tuple[train_state.TrainState, metrics.Metrics]
]


def shape_of(
    options: rlvr_config.Config, sizes: Sequence[encode.Size], devices: setup.Devices
) -> RowShape:
    """Return the rows into which the responses of any part of a rollout fit."""
    prompts = options.rollout.num_prompts // options.train.num_minibatches
    part = dataclasses.replace(options.rollout, num_prompts=prompts)
    return policy_rows.shape_of(options.rows, part, sizes, devices)


def make(
    options: rlvr_config.Config,
    devices: setup.Devices,
    model: setup.Model,
    optimizer: optim.Optimizer,
    start: setup.Start,
    shape: RowShape,
) -> Update:
    """Return the updates of the policy that follow each rollout."""
    step = policy_rows.make_update(
        options.algorithm,
        policy_rows.settings(options.train, options.rollout, options.model, devices),
        model,
        optimizer,
        start,
        shape,
        reference=options.reference.loss,
    )
    return functools.partial(update, step, num_epochs=options.train.num_epochs)


def update(
    step: train_step.TrainStep,
    state: train_state.TrainState,
    parts: Batches,
    key: jax.Array,
    *,
    num_epochs: int,
) -> tuple[train_state.TrainState, metrics.Metrics]:
    """Take one step for each part, in order, `num_epochs` times; merge what they tell."""
    if len(parts) * num_epochs == 1:
        return step(state, parts[0], key)
    told = []
    for number in range(len(parts) * num_epochs):
        own_key = jax.random.fold_in(key, number)
        state, one = step(state, parts[number % len(parts)], own_key)
        told.append(one)
    return state, _merge(told)


@jax.jit
def _merge(told: list[metrics.Metrics]) -> metrics.Metrics:
    merged = told[0]
    for one in told[1:]:
        merged = {name: merged[name].merge(one[name]) for name in merged}
    merged[_LAST] = told[-1][_LAST]
    most = jnp.stack([one[_LARGEST].value for one in told]).max()
    merged[_LARGEST] = metrics.Mean(total=most, weight=jnp.ones(()))
    return merged
