"""The programs of RLVR; see `setup.programs`."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from prism_jax.data import encode
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import loss as policy_loss
from prism_jax.policy import programs as policy_programs
from prism_jax.policy import update as policy_update
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import programs
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import updates as rlvr_updates


def programs_of(
    options: rlvr_config.Config,
    devices: devices_lib.Devices,
    models: Mapping[str, setup_models.Model],
    bounds: programs.Bounds,
) -> list[programs.Program]:
    """Return prefill, decoding, log-probs where something needs them, and the update."""
    model = models["policy"]
    bounds = bounds.within(options.prompts.max_pixels, model.config)
    size = encode.Size(
        tokens=bounds.prompt_tokens, patches=bounds.prompt_patches, images=bounds.prompt_images
    )
    shape = rlvr_updates.shape_of(options, [size], devices)
    # Any number of steps: the schedule is a formula, and takes no memory.
    optimizer = setup_models.make_optimizer(options.optim, model.params, num_steps=1000)
    start = setup_models.start_of(model, optimizer, devices, key=programs.key())
    rows = policy_programs.rows(model, devices, shape)
    train, reference = options.train, options.reference
    state, kept = programs.state_parts(start.abstract), {}
    if reference.is_used:
        kept = {"reference": start.abstract.params}
    taught = policy_programs.taught(options.distill, devices)
    drawn = dataclasses.replace(options.rollout, num_prompts=options.generation_prompts)
    listed = policy_programs.sampler(
        drawn, model, devices, bounds, beside=state | kept | taught.beside
    )
    settings = policy_update.settings(train, options.rollout, options.model, devices)
    work = policy_programs.update_work(
        model, shape, train, options.model, calls=train.num_minibatches
    )
    forward = dataclasses.replace(work, has_gradient=False)
    # A single update computes the log-probs before it in its own forward pass.
    has_several = train.num_updates > 1
    has_old = has_several or reference.reward_coefficient is not None
    if has_old or reference.is_used:
        listed.append(
            programs.Program(
                phase="log-probs",
                devices=devices,
                function=policy_loss.make_logprobs(model.graphdef, settings),
                arguments=(start.abstract.params, rows),
                static={},
                parts={"parameters": start.abstract.params, "batch": rows},
                beside={"states": start.abstract.opt_state} | kept | taught.beside,
                # One program for both models, which differ in their parameters alone.
                work=dataclasses.replace(
                    forward, calls=forward.calls * (has_old + reference.is_used)
                ),
            )
        )
    batch = _learned_from(rows, options)
    update = rlvr_updates.make_update(
        options, devices, model, optimizer, start, shape, taught.teacher
    )
    listed.append(
        programs.Program(
            phase="update",
            devices=devices,
            function=update,
            arguments=(start.abstract, taught.batch(batch), programs.key()),
            static={},
            parts=state | {"batch": batch} | taught.beside,
            beside=kept,
            note=taught.note,
            gradients=programs.trainable(optimizer, start.abstract),
            work=dataclasses.replace(work, calls=work.calls * train.num_epochs),
        )
    )
    return listed


def _learned_from(
    batch: policy_batch.PolicyBatch, options: rlvr_config.Config
) -> policy_batch.PolicyBatch:
    """Return the rows in the form of an update, see `packing.Packer.finish`."""
    batch = policy_programs.with_advantages(batch)
    # Memory depends on shapes alone, and all log-probs have one.
    if options.train.num_updates > 1:
        batch = dataclasses.replace(batch, old_logprobs=batch.sampler_logprobs)
    if options.groups.keep != "all":
        place = batch.lengths
        is_older = jax.ShapeDtypeStruct(place.shape, np.bool_, sharding=place.sharding)
        batch = dataclasses.replace(batch, is_older=is_older)
    if options.reference.is_used:
        batch = dataclasses.replace(batch, reference_logprobs=batch.sampler_logprobs)
    return batch
