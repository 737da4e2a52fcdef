"""The updates that follow a rollout: one, strictly on-policy, or several over parts of it.

    rollout   prompts a b c d e f      num_minibatches 3, num_epochs 2
    updates   a b | c d | e f | a b | c d | e f

The denominators are those of the part. Several updates have a ratio to the policy before
the first of them; see `policy.loss`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from prism_jax import metrics
from prism_jax.data import encode
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import distill as policy_distill
from prism_jax.policy import update as policy_update
from prism_jax.rows import RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.training import optim, train_step

# The optimizer's counters are not averaged over the updates: log the last, and the largest.
_LAST, _LARGEST = "optim/skipped_updates", "optim/skipped_in_row"

# With an open teacher each is `train_step.WithShared` of such a batch.
Batches = tuple[policy_batch.PolicyBatch | train_step.WithShared, ...]


def shape_of(
    options: rlvr_config.Config, sizes: Sequence[encode.Size], devices: devices_lib.Devices
) -> RowShape:
    """Return the rows into which the responses of any part of a step fit."""
    # A part is packed by itself: rows for the whole step would be mostly empty.
    part_prompts = options.rollout.num_prompts // options.train.num_minibatches
    part = dataclasses.replace(options.rollout, num_prompts=part_prompts)
    return policy_update.shape_of(options.rows, part, sizes, devices)


def make_update(
    options: rlvr_config.Config,
    devices: devices_lib.Devices,
    model: setup_models.Model,
    optimizer: optim.Optimizer,
    start: setup_models.Start,
    shape: RowShape,
    teacher: policy_distill.Teacher | None = None,
) -> train_step.TrainStep:
    """Return the update of the policy on one part of a step."""
    return policy_update.make_update(
        options.algorithm,
        policy_update.settings(options.train, options.rollout, options.model, devices),
        model,
        optimizer,
        start,
        shape,
        reference=options.reference.loss,
        teaching=policy_distill.teaching_of(options.distill, teacher),
    )


@jax.jit
def merge(updates: list[metrics.Metrics]) -> metrics.Metrics:
    """Merge the metrics of a step's updates."""
    # On the devices: the loop reads metrics a step late, and nothing here may wait for an update.
    merged = updates[0]
    for logged in updates[1:]:
        merged = {name: merged[name].merge(logged[name]) for name in merged}
    merged[_LAST] = updates[-1][_LAST]
    most = jnp.stack([logged[_LARGEST].value for logged in updates]).max()
    merged[_LARGEST] = metrics.Mean(total=most, weight=jnp.ones(()))
    return merged
