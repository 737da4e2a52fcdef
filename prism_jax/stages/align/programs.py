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
    options.discriminator.rows.check_router(discriminator.config, place="config.discriminator.rows")
    bounds = bounds.within(options.prompts.max_pixels, policy.config)
    own_bounds = bounds.within(options.discriminator.max_pixels, discriminator.config)
    shapes = _shapes(options, devices, bounds, own_bounds)
    taught = policy_programs.taught(options.distill, devices)
    starts, updates = align_updates.open_updates(
        options, devices, policy, discriminator, shapes, taught.teacher, key=jax.random.key(0)
    )
    parts = {name: programs.state_parts(start.abstract, name) for name, start in starts.items()}
    listed = policy_programs.sampler(
        options.rollout,
        policy,
        devices,
        bounds,
        beside=parts["policy"] | parts["discriminator"] | taught.beside,
    )
    rows = policy_programs.with_advantages(policy_programs.rows(policy, devices, shapes.policy))
    listed += _of_discriminator(
        options,
        devices,
        discriminator,
        shapes,
        starts,
        updates,
        parts["policy"] | taught.beside,
        rows,
    )
    listed.append(
        programs.Program(
            phase="policy's update",
            devices=devices,
            function=updates.policy,
            arguments=(starts["policy"].abstract, taught.batch(rows), programs.key()),
            static={},
            parts=parts["policy"] | {"batch": rows} | taught.beside,
            note=taught.note,
            beside=parts["discriminator"],
            gradients=programs.trainable(
                align_updates.optimizer_of(options, policy), starts["policy"].abstract
            ),
            work=policy_programs.update_work(
                policy, shapes.policy, options.train, options.model, calls=1
            ),
        )
    )
    return listed


def _of_discriminator(
    options: align_config.Config,
    devices: devices_lib.Devices,
    model: setup_models.Model,
    shapes: align_feed.Shapes,
    starts: Mapping[str, setup_models.Start],
    updates: align_updates.Updates,
    policy: Mapping[str, programs.Tree],
    rows: policy_batch.PolicyBatch,
) -> list[programs.Program]:
    """Return the scores and the update that learns from them.

    Args:
      policy: parts of the policy's state, which lie beside.
      rows: of the policy, which wait for its update.
    """
    state = starts["discriminator"].abstract
    segments = discriminator_programs.batch(
        model,
        devices,
        shapes.discriminator,
        is_paired=False,
        positions=options.discriminator.positions,
    )
    work = discriminator_programs.work(model, shapes.discriminator)
    scores = programs.Program(
        phase="scores",
        devices=devices,
        function=discriminator_loss.make_scorer(
            model.graphdef, align_updates.score_settings(options, devices)
        ),
        arguments=(state.params, segments),
        static={},
        parts={"discriminator parameters": state.params, "batch": segments},
        # While segments are scored, the policy and the optimizer's states stay in memory.
        beside=policy | {"discriminator states": state.opt_state},
        work=work,
    )
    # The update takes gradients of scores that are known: it has one input more than the scores.
    place = segments.last
    gradients = jax.ShapeDtypeStruct(place.shape, np.float32, sharding=place.sharding)
    segments = dataclasses.replace(segments, score_gradients=gradients)
    update = programs.Program(
        phase="discriminator's update",
        devices=devices,
        function=updates.discriminator,
        arguments=(state, segments, programs.key()),
        static={},
        parts=programs.state_parts(state, "discriminator") | {"batch": segments},
        beside=policy | {"policy batch": rows},
        gradients=programs.trainable(align_updates.optimizer_of(options, model), state),
        work=dataclasses.replace(
            work,
            calls=work.calls * options.pace.discriminator_updates,
            has_gradient=True,
            remat=options.discriminator.remat,
        ),
    )
    return [scores, update]


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
    section, rollout = options.discriminator, options.rollout
    size = encode.Size(
        tokens=bounds.prompt_tokens, patches=bounds.prompt_patches, images=bounds.prompt_images
    )
    sees_images = section.sees_images
    # Teachers and students share rows, so the longer response sets their size.
    continued = max(bounds.teacher_tokens, rollout.max_response_tokens)
    num_names = len(section.form.names)
    largest = Largest(
        # A prompt has one teacher's segment of each name, and one of each response.
        num_units=num_names * rollout.num_prompts * (1 + rollout.num_responses),
        unit_sequences=1,
        unit_tokens=bounds.prompt_tokens + continued,
        continued_tokens=continued,
        prompt_patches=own_bounds.prompt_patches if sees_images else 0,
        prompt_frames=own_bounds.prompt_images if sees_images else 0,
    )
    return align_feed.Shapes(
        policy=policy_update.shape_of(options.rows, rollout, [size], devices),
        discriminator=section.rows.shape(
            largest,
            devices,
            shared_units=num_names * (1 + rollout.num_responses),
            place="config.discriminator.rows",
        ),
    )
