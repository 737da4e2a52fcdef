"""The programs of RLVR; see `setup.programs`."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from prism_jax.data import encode
from prism_jax.discriminator import programs as discriminator_programs
from prism_jax.discriminator import updates as discriminator_updates
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import loss as policy_loss
from prism_jax.policy import programs as policy_programs
from prism_jax.policy import update as policy_update
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import programs
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import updates as rlvr_updates
from prism_jax.training import train_state


def programs_of(
    options: rlvr_config.Config,
    devices: devices_lib.Devices,
    models: Mapping[str, setup_models.Model],
    bounds: programs.Bounds,
) -> list[programs.Program]:
    """Return prefill, decoding, log-probs where something needs them, and the updates."""
    model = models["policy"]
    bounds = bounds.within(options.prompts.max_pixels, model.config)
    size = encode.Size(
        tokens=bounds.prompt_tokens, patches=bounds.prompt_patches, images=bounds.prompt_images
    )
    shape = rlvr_updates.shape_of(options, [size], devices)
    optimizer = setup_models.make_optimizer(options.optim, model.params, num_steps=1000)
    start = setup_models.start_of(model, optimizer, devices, key=programs.key())
    rows = policy_programs.rows(model, devices, shape)
    train = options.train
    state, kept = programs.state_parts(start.abstract), {}
    if options.reference.is_used:
        kept["reference"] = start.abstract.params
    taught = policy_programs.taught(models.get("teacher"), devices)
    learner = None
    if options.adversary is not None:
        learner = _learner(options, devices, models["discriminator"], bounds)
        kept |= learner.held()
    rollout = dataclasses.replace(options.rollout, num_prompts=options.generation_prompts)
    beside = state | kept | taught.beside
    listed = policy_programs.sampler(rollout, model, devices, bounds, beside=beside)
    work = policy_programs.update_work(
        model, shape, train, options.model, calls=train.num_minibatches
    )
    listed += _logprobs(options, devices, model, rows, start.abstract, kept | taught.beside, work)
    batch = _learned_from(rows, options)
    if learner is not None:
        others = {name: tree for name, tree in beside.items() if name not in learner.held()}
        listed += learner.programs_of(beside=others | {"policy batch": batch}, waiting={})
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


def _logprobs(
    options: rlvr_config.Config,
    devices: devices_lib.Devices,
    model: setup_models.Model,
    rows: policy_batch.PolicyBatch,
    state: train_state.TrainState,
    kept: Mapping[str, programs.Tree],
    update: programs.Work,
) -> list[programs.Program]:
    """Return the log-probs of the policy and of the reference, where needed.

    Args:
      kept: what is not trained, by name.
      update: the work of an update, all parts of a step once.
    """
    settings = policy_update.settings(options.train, options.rollout, options.model, devices)
    forward = dataclasses.replace(update, has_gradient=False)
    has_reference = options.reference.is_used
    # As `packing.Packer` decides: a single update computes the log-probs before it by itself.
    has_old = options.train.num_updates > 1 or options.reference.reward_coefficient is not None
    if not has_old and not has_reference:
        return []
    return [
        programs.Program(
            phase="log-probs",
            devices=devices,
            function=policy_loss.make_logprobs(model.graphdef, settings),
            arguments=(state.params, rows),
            static={},
            parts={"parameters": state.params, "batch": rows},
            beside={"states": state.opt_state} | dict(kept),
            # One program for both models, which differ in their parameters alone.
            work=dataclasses.replace(forward, calls=forward.calls * (has_old + has_reference)),
        )
    ]


def _learner(
    options: rlvr_config.Config,
    devices: devices_lib.Devices,
    model: setup_models.Model,
    bounds: programs.Bounds,
) -> discriminator_programs.Learner:
    """Return the discriminator of the adversarial term, see `stages.rlvr.adversary_opening`."""
    adversary, rollout = options.adversary, options.rollout
    section, place = adversary.discriminator, "config.adversary.discriminator"
    section.rows.check_router(model.config, place=f"{place}.rows")
    shape = discriminator_programs.step_shape(
        section,
        devices,
        bounds.within(section.max_pixels, model.config),
        num_prompts=rollout.num_prompts,
        num_responses=rollout.num_responses,
        max_response_tokens=rollout.max_response_tokens,
        place=place,
    )
    optimizer = setup_models.make_optimizer(section.optim, model.params, num_steps=1000)
    start = setup_models.start_of(model, optimizer, devices, key=programs.key())
    settings = discriminator_updates.settings_of(section, devices)
    return discriminator_programs.Learner(
        section=section,
        devices=devices,
        model=model,
        optimizer=optimizer,
        state=start.abstract,
        shape=shape,
        num_updates=adversary.updates,
        update=discriminator_updates.make_update(
            section.rule(model), settings, model, optimizer, start, shape
        ),
    )


def _learned_from(
    batch: policy_batch.PolicyBatch, options: rlvr_config.Config
) -> policy_batch.PolicyBatch:
    """Return the rows in the form of an update, see `packing.Packer.finish`."""
    batch = policy_programs.with_advantages(batch)
    if options.train.num_updates > 1:
        batch = dataclasses.replace(batch, old_logprobs=batch.sampler_logprobs)
    if options.groups.keep != "all":
        place = batch.lengths
        is_older = jax.ShapeDtypeStruct(place.shape, np.bool_, sharding=place.sharding)
        batch = dataclasses.replace(batch, is_older=is_older)
    if options.reference.is_used:
        batch = dataclasses.replace(batch, reference_logprobs=batch.sampler_logprobs)
    return batch
