"""The programs of alignment; see `setup.programs`."""

from collections.abc import Mapping

import jax

from prism_jax.data import encode
from prism_jax.discriminator import programs as discriminator_programs
from prism_jax.policy import programs as policy_programs
from prism_jax.policy import update as policy_update
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import programs
from prism_jax.stages.align import config as align_config
from prism_jax.stages.align import feed as align_feed
from prism_jax.stages.align import mean_weights
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
    discriminator_bounds = bounds.within(options.discriminator.max_pixels, discriminator.config)
    shapes = _shapes(options, devices, bounds, discriminator_bounds)
    taught = policy_programs.taught(models.get("teacher"), devices)
    starts, updates = align_updates.open_updates(
        options, devices, policy, discriminator, shapes, taught.teacher, key=jax.random.key(0)
    )
    start = setup_models.together(starts)
    if updates.average is not None:
        start = mean_weights.with_mean(start)
    learner = discriminator_programs.Learner(
        section=options.discriminator,
        devices=devices,
        model=discriminator,
        optimizer=align_updates.optimizer_of(options, discriminator),
        state=start.abstract["discriminator"],
        mean=start.abstract.get(mean_weights.NAME),
        shape=shapes.discriminator,
        num_updates=options.pace.discriminator_updates,
        update=updates.discriminator,
    )
    state = start.abstract["policy"]
    parts = programs.state_parts(state, "policy")
    listed = policy_programs.sampler(
        options.rollout, policy, devices, bounds, beside=parts | learner.held() | taught.beside
    )
    rows = policy_programs.with_advantages(policy_programs.rows(policy, devices, shapes.policy))
    listed += learner.programs_of(beside=parts | taught.beside, waiting={"policy batch": rows})
    listed.append(
        programs.Program(
            phase="policy's update",
            devices=devices,
            function=updates.policy,
            arguments=(state, taught.batch(rows), programs.key()),
            static={},
            parts=parts | {"batch": rows} | taught.beside,
            beside=learner.held(),
            note=taught.note,
            gradients=programs.trainable(align_updates.optimizer_of(options, policy), state),
            work=policy_programs.update_work(
                policy, shapes.policy, options.train, options.model, calls=1
            ),
        )
    )
    return listed


def _shapes(
    options: align_config.Config,
    devices: devices_lib.Devices,
    bounds: programs.Bounds,
    discriminator_bounds: programs.Bounds,
) -> align_feed.Shapes:
    """Return the rows of a step whose prompts have the assumed sizes, as `feed.Feed.shapes`.

    Args:
      discriminator_bounds: of the pictures as the discriminator sees them.
    """
    section, rollout = options.discriminator, options.rollout
    size = encode.Size(
        tokens=bounds.prompt_tokens, patches=bounds.prompt_patches, images=bounds.prompt_images
    )
    return align_feed.Shapes(
        policy=policy_update.shape_of(options.rows, rollout, [size], devices),
        discriminator=discriminator_programs.step_shape(
            section,
            devices,
            discriminator_bounds,
            num_prompts=rollout.num_prompts + (section.steadying.replay_prompts or 0),
            num_responses=rollout.num_responses,
            max_response_tokens=rollout.max_response_tokens,
            place="config.discriminator",
        ),
    )
