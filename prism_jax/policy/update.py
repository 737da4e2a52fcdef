"""The policy's part of a step in alignment and RLVR: shapes, rows and the update."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from models.inputs import Example
from prism_jax import configuration
from prism_jax.data import encode
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import loss as policy_loss
from prism_jax.policy import rollouts
from prism_jax.policy import teaching as teaching_lib
from prism_jax.rows import Largest, RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import row_shapes, train_sections
from prism_jax.training import optim, train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(train_sections.Train):
    """The length of a run, and the computation of the policy's update."""

    num_steps: int
    head_chunk_tokens: int  # whose logits are in a device's memory at a time
    has_entropy: bool  # measure the policy's entropy
    num_threads: int = configuration.free()  # steps whose prompts are prepared ahead

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = super().problems()
        return problems + configuration.at_least(self, 1, "head_chunk_tokens", "num_threads")


def shape_of(
    rows: row_shapes.Rows,
    options: rollouts.Rollout,
    sizes: Sequence[encode.Size],
    devices: devices_lib.Devices,
) -> RowShape:
    """Return the rows into which the responses of any step fit."""
    largest = Largest(
        num_units=options.num_prompts * options.num_responses,
        unit_sequences=1,
        unit_tokens=max(size.tokens for size in sizes) + options.max_response_tokens,
        continued_tokens=options.max_response_tokens,
        prompt_patches=max(size.patches for size in sizes),
        prompt_frames=max(size.images for size in sizes),
    )
    return rows.shape(largest, devices, shared_units=options.num_responses, place="config.rows")


def on_policy_batch(
    prompts: Sequence[Example],
    responses: rollouts.Responses,
    advantages: np.ndarray,
    shape: RowShape,
    model: setup_models.Model,
) -> policy_batch.PolicyBatch:
    """Return the rows from which the policy learns."""
    rollout = responses.rollout
    logprobs = [rollout.logprobs[number, :length] for number, length in enumerate(rollout.lengths)]
    return policy_batch.on_policy_batch(
        prompts, responses.continuations(), logprobs, advantages, shape, model.config
    )


def make_update(
    algorithm: policy_loss.Algorithm,
    settings: policy_loss.Settings,
    model: setup_models.Model,
    optimizer: optim.Optimizer,
    start: setup_models.Start,
    shape: RowShape,
    *,
    reference: policy_loss.Kl | None = None,
    teaching: teaching_lib.Teaching | None = None,
) -> train_step.TrainStep:
    """Return the update of the policy.

    Args:
      reference: adds the KL from a reference policy.
      teaching: adds an open teacher; a batch is then `train_step.WithShared` with a lesson.
    """

    def loss(model: nnx.Module, batch: Any, key: jax.Array):
        del key
        rows, lesson = (batch, None) if teaching is None else (batch.rows, batch.shared)
        return policy_loss.loss(model, rows, algorithm, settings, reference, teaching, lesson)

    def weights(batch: Any) -> dict[str, jax.Array]:
        rows = batch if teaching is None else batch.rows
        return policy_loss.weights(rows, algorithm, settings, reference, teaching)

    return train_step.make_train_step(
        model.graphdef,
        loss,
        optimizer,
        weights_fn=weights,
        coefficients=policy_loss.coefficients(reference, teaching),
        num_microbatches=shape.num_microbatches,
        shardings=start.shardings,
    )


def settings(
    train: Train,
    rollout: rollouts.Rollout,
    model: configuration.Model,
    devices: devices_lib.Devices,
) -> policy_loss.Settings:
    """Return the settings with which the policy's loss is computed."""
    return policy_loss.Settings(
        temperature=rollout.temperature,
        max_response_tokens=rollout.max_response_tokens,
        chunk_tokens=train.head_chunk_tokens * devices.row_parts(),
        has_entropy=train.has_entropy,
        implementation=devices.attention,
        remat=model.remat,
    )
