"""The programs of the warm-up; see `setup.programs`."""

import dataclasses
from collections.abc import Mapping

from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import programs as discriminator_programs
from prism_jax.rows import Largest
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import programs
from prism_jax.stages.warmup import config as warmup_config
from prism_jax.stages.warmup import step as warmup_step


def programs_of(
    options: warmup_config.Config,
    devices: devices_lib.Devices,
    models: Mapping[str, setup_models.Model],
    bounds: programs.Bounds,
) -> list[programs.Program]:
    """Return the update, and the scores of held-out pairs."""
    model, data = models["discriminator"], options.data
    options.rows.check_router(model.config, place="config.rows")
    bounds = bounds.within(data.max_pixels, model.config)
    segment_tokens = min(bounds.teacher_tokens, data.max_tokens - bounds.prompt_tokens)
    images = (bounds.prompt_patches, bounds.prompt_images) if data.sees_images else (0, 0)
    names = data.form.names
    shape = options.rows.shape(
        Largest(
            num_units=options.train.num_pairs * len(names),
            # Both sides of a pair lie in one row, each behind the prompt.
            unit_sequences=2,
            unit_tokens=2 * (bounds.prompt_tokens + segment_tokens),
            continued_tokens=2 * segment_tokens,
            prompt_patches=images[0],
            prompt_frames=images[1],
        ),
        devices,
        shared_units=1,
        place="config.rows",
    )
    # Any number of steps: the schedule is a formula, and takes no memory.
    optimizer = setup_models.make_optimizer(options.optim, model.params, num_steps=1000)
    start = setup_models.start_of(model, optimizer, devices, key=programs.key())
    batch = discriminator_programs.batch(model, devices, shape, is_paired=True, positions="mrope")
    update = warmup_step.make_update(options, devices, model, optimizer, start, shape)
    work = discriminator_programs.work(model, shape)
    state = programs.state_parts(start.abstract)
    listed = [
        programs.Program(
            phase="update",
            devices=devices,
            function=update,
            arguments=(start.abstract, batch, programs.key()),
            static={},
            parts=state | {"batch": batch},
            beside={},
            gradients=programs.trainable(optimizer, start.abstract),
            work=dataclasses.replace(work, has_gradient=True, remat=options.model.remat),
        )
    ]
    if options.evaluate.every_steps is not None and data.held_out_fraction:
        listed.append(
            programs.Program(
                phase="scores",
                devices=devices,
                function=discriminator_loss.make_scorer(
                    model.graphdef, warmup_step.score_settings(options, devices)
                ),
                arguments=(start.abstract.params, batch),
                static={},
                parts={"parameters": start.abstract.params, "batch": batch},
                beside={"states": start.abstract.opt_state},
                work=dataclasses.replace(work, calls=0),  # of no step
            )
        )
    return listed
