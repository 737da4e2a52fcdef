"""The discriminator's programs with abstract arguments; see `setup.programs`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from prism_jax.data import encode
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import opening, updates
from prism_jax.discriminator import section as section_lib
from prism_jax.rows import RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import programs
from prism_jax.training import optim, train_state


def batch(
    model: setup_models.Model,
    devices: devices_lib.Devices,
    shape: RowShape,
    *,
    is_paired: bool,
    positions: discriminator_batch.Positions,
) -> discriminator_batch.SegmentBatch:
    """Return the abstract rows of a step.

    Args:
      is_paired: teacher's and student's segments stand side by side, see `batch.segment_rows`.
    """
    one = programs.continuation()
    packed = discriminator_batch.segment_rows(
        [programs.example()],
        [[one, one] if is_paired else [one]],
        [0],
        [0],
        programs.one_row(shape),
        model.config,
        positions=positions,
    )
    return programs.expand(
        packed.batch, devices, num_microbatches=shape.num_microbatches, rows=shape.microbatch_rows
    )


def work(model: setup_models.Model, shape: RowShape) -> programs.Work:
    """Return the work of scoring all rows of a step."""
    return programs.Work(
        model=model.config,
        **programs.tokens_of(shape),
        sequence_tokens=shape.row_tokens,
        patches=shape.microbatch_rows * shape.row_patches,
        head_tokens=0,
        calls=shape.num_microbatches,
        has_gradient=False,
        is_decoding=False,
    )


def step_shape(
    section: section_lib.Discriminator,
    devices: devices_lib.Devices,
    bounds: programs.Bounds,
    *,
    num_prompts: int,
    num_responses: int,
    max_response_tokens: int,
    place: str,
) -> RowShape:
    """Return the rows of a step whose prompts have the assumed sizes, as `opening.Cutter.shape`.

    Args:
      bounds: with the pictures as the discriminator sees them.
    """
    patches, images = bounds.prompt_patches, bounds.prompt_images
    if not section.sees_images:
        patches = images = 0
    return opening.step_shape(
        section,
        devices,
        encode.Size(tokens=bounds.prompt_tokens, patches=patches, images=images),
        continued_tokens=max(bounds.teacher_tokens, max_response_tokens),
        num_prompts=num_prompts,
        num_responses=num_responses,
        place=place,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """A discriminator that learns with the policy, abstract."""

    section: section_lib.Discriminator
    devices: devices_lib.Devices
    model: setup_models.Model
    optimizer: optim.Optimizer
    state: train_state.TrainState
    mean: nnx.State | None = None  # of its weights, whose scores reward the policy
    shape: RowShape
    num_updates: int  # in a step
    update: Any  # jitted, see `discriminator.updates.make_update`

    def held(self) -> dict[str, programs.Tree]:
        """Return the named parts of its state."""
        mean = {} if self.mean is None else {"mean parameters": self.mean}
        return programs.state_parts(self.state, "discriminator") | mean

    def programs_of(
        self, *, beside: Mapping[str, programs.Tree], waiting: Mapping[str, programs.Tree]
    ) -> list[programs.Program]:
        """Return the scores, those of the mean where there is one, and the update.

        Args:
          beside: on the devices all the time.
          waiting: on the devices during the update alone.
        """
        segments = batch(
            self.model,
            self.devices,
            self.shape,
            is_paired=False,
            positions=self.section.positions,
        )
        one = work(self.model, self.shape)
        # The first update learns from the scores at hand, unless they are without its dropout.
        refreshed = self.num_updates - 1 + (self.section.head_dropout > 0)
        listed = [
            self._scores(
                "scores",
                "discriminator parameters",
                segments,
                beside,
                dataclasses.replace(one, calls=one.calls * (1 + refreshed)),
            )
        ]
        if self.mean is not None:
            name = "mean parameters"
            listed.append(self._scores("scores of the mean", name, segments, beside, one))
        place = segments.last
        gradients = jax.ShapeDtypeStruct(place.shape, np.float32, sharding=place.sharding)
        segments = dataclasses.replace(segments, score_gradients=gradients)
        held = self.held()
        mean = {name: held.pop(name) for name in list(held) if name.startswith("mean ")}
        update = programs.Program(
            phase="discriminator's update",
            devices=self.devices,
            function=self.update,
            arguments=(self.state, segments, programs.key()),
            static={},
            parts=held | {"batch": segments},
            beside={**beside, **mean, **waiting},
            gradients=programs.trainable(self.optimizer, self.state),
            work=dataclasses.replace(
                one,
                calls=one.calls * self.num_updates,
                has_gradient=True,
                remat=self.section.remat,
                # The penalty scores the noisy segments besides.
                passes=1 if self.section.steadying.penalty is None else 2,
            ),
        )
        return [*listed, update]

    def _scores(
        self,
        phase: str,
        name: str,
        segments: discriminator_batch.SegmentBatch,
        beside: Mapping[str, programs.Tree],
        work: programs.Work,
    ) -> programs.Program:
        """Return the scores by the parameters of this name."""
        held = self.held()
        params = held.pop(name)
        return programs.Program(
            phase=phase,
            devices=self.devices,
            function=discriminator_loss.make_scorer(
                self.model.graphdef, updates.settings_of(self.section, self.devices)
            ),
            arguments=(params, segments),
            static={},
            parts={name: params, "batch": segments},
            beside={**beside, **held},
            work=work,
        )
