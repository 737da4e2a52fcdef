"""The programs of alignment; see `setup.programs`."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from prism_jax.data import encode
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import programs as discriminator_programs
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import programs as policy_programs
from prism_jax.policy import update as policy_update
from prism_jax.rows import Largest
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import programs
from prism_jax.stages.align import config as align_config
from prism_jax.stages.align import feed as align_feed
from prism_jax.stages.align import updates as align_updates


def programs_of(
    options: align_config.Config,
    devices: devices_lib.Devices,
    models: Mapping[str, setup_models.Model],
    bounds: programs.Bounds,
) -> list[programs.Program]:
    """Return prefill, decoding, the scores, and the updates of both models."""
    policy, discriminator = models["policy"], models["discriminator"]
    bounds = bounds.within(options.prompts.max_pixels, policy.config)
    own_bounds = bounds.within(options.discriminator.max_pixels, discriminator.config)
    shapes = _shapes(options, devices, bounds, own_bounds)
    starts, updates = align_updates.open_updates(
        options, devices, policy, discriminator, shapes, key=jax.random.key(0)
    )
    parts = {name: programs.state_parts(start.abstract, name) for name, start in starts.items()}
    found = policy_programs.sampler(
        options.rollout, policy, devices, bounds, beside=parts["policy"] | parts["discriminator"]
    )
    segments = discriminator_programs.batch(
        discriminator,
        devices,
        shapes.discriminator,
        is_paired=False,
        positions=options.discriminator.positions,
    )
    state = starts["discriminator"].abstract
    score = discriminator_loss.make_scorer(
        discriminator.graphdef, align_updates.score_settings(options, devices)
    )
    work = discriminator_programs.work(discriminator, shapes.discriminator)
    found.append(
        programs.Program(
            phase="scores",
            function=score,
            arguments=(state.params, segments),
            static={},
            parts={"discriminator parameters": state.params, "batch": segments},
            beside=parts["policy"] | {"discriminator states": state.opt_state},
            work=work,
        )
    )
    place = segments.last
    gradients = jax.ShapeDtypeStruct(place.shape, np.float32, sharding=place.sharding)
    segments = dataclasses.replace(segments, score_gradients=gradients)
    rows = _policy_rows(policy, devices, shapes)
    found.append(
        programs.Program(
            phase="discriminator's update",
            function=updates.discriminator,
            arguments=(state, segments, programs.key()),
            static={},
            parts=parts["discriminator"] | {"batch": segments},
            beside=parts["policy"] | {"policy batch": rows},
            work=dataclasses.replace(
                work,
                calls=work.calls * options.pace.discriminator_updates,
                has_gradient=True,
                remat=options.discriminator.remat,
            ),
        )
    )
    shape = shapes.policy
    found.append(
        programs.Program(
            phase="policy's update",
            function=updates.policy,
            arguments=(starts["policy"].abstract, rows, programs.key()),
            static={},
            parts=parts["policy"] | {"batch": rows},
            beside=parts["discriminator"],
            work=programs.Work(
                model=policy.config,
                tokens=shape.microbatch_rows * shape.row_tokens,
                sequence_tokens=shape.row_tokens,
                patches=shape.microbatch_rows * shape.row_patches,
                head_tokens=shape.microbatch_rows * shape.row_continued_tokens,
                head_chunk_tokens=options.train.head_chunk_tokens,
                calls=shape.num_microbatches,
                has_gradient=True,
                is_decoding=False,
                remat=options.model.remat,
            ),
        )
    )
    return found


def _shapes(
    options: align_config.Config,
    devices: devices_lib.Devices,
    bounds: programs.Bounds,
    own_bounds: programs.Bounds,
) -> align_feed.Shapes:
    """Return the rows of a step whose prompts have the assumed sizes, as `feed.Feed.shapes`.

    Args:
      own_bounds: of the pictures as the discriminator sees them.
    """
    section, drawn = options.discriminator, options.rollout
    size = encode.Size(
        tokens=bounds.prompt_tokens, patches=bounds.prompt_patches, images=bounds.prompt_images
    )
    sees_images = section.sees_images
    continued = max(bounds.teacher_tokens, drawn.max_response_tokens)
    largest = Largest(
        num_units=len(section.form.names) * drawn.num_prompts * (1 + drawn.num_responses),
        unit_sequences=1,
        unit_tokens=bounds.prompt_tokens + continued,
        continued_tokens=continued,
        prompt_patches=own_bounds.prompt_patches if sees_images else 0,
        prompt_frames=own_bounds.prompt_images if sees_images else 0,
    )
    return align_feed.Shapes(
        policy=policy_update.shape_of(options.rows, drawn, [size], devices),
        discriminator=section.rows.shape(largest, devices, place="config.discriminator.rows"),
    )


def _policy_rows(
    policy: setup_models.Model, devices: devices_lib.Devices, shapes: align_feed.Shapes
) -> policy_batch.PolicyBatch:
    """Return the abstract rows of the policy's update."""
    shape = shapes.policy
    batch = policy_batch.pack(
        [programs.example()],
        [programs.continuation()],
        [np.zeros(1, np.float32)],
        np.zeros(1, np.float32),
        programs.one_row(shape),
        policy.config,
    )
    return programs.expand(
        batch, devices, num_microbatches=shape.num_microbatches, rows=shape.microbatch_rows
    )
