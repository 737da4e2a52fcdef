"""Stage 3, RL with verifiable rewards: `python -m prism_jax rlvr --config=configs/rlvr.py:4b …`.

    prompts ─→ policy ─→ responses ─→ judge ─→ rewards ─→ advantages ─→ updates of the policy
       ↑                                 │                    ↑              ↑
       └── until enough groups vary ─────┘                    └─ reference policy ─┘   (off)

Each step draws responses to some prompts, rewards them by their answers (0.8) and their format
(0.2), compares each reward with those of the other responses to its prompt, and updates the policy:
once, strictly on-policy, or several times. Which algorithm that is, the configuration says; see
`rlvr_config`.

`config.model.folder` is the aligned policy: the workdir of `align` (or `sft`), or a Hugging Face
folder. Runs on TPU, GPU or CPU; configs/rlvr.py names sizes, hardware and sources.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence

import jax

from prism_jax import configuration, loop
from prism_jax.data import processor
from prism_jax.stages import (
    asking,
    prompt_mixture,
    responses,
    rlvr_config,
    rlvr_experience,
    rlvr_groups,
    rlvr_reference,
    rlvr_update,
    rollouts,
    running,
    sampled,
    setup,
)

# May change between a run and its continuation; prompts and reference themselves are compared.
_MAY_DIFFER = (
    "prompts.path",
    "prompts.image_root",
    "prompts.cache_dir",
    "reference.folder",
    "rewards.num_workers",
    "rollout.batch_responses",
    "rollout.tensor",
    "rollout.chunk_tokens",
    "rollout.dump_every_steps",
    "train.num_threads",
)

_WATCHED = ("reward/total_mean", "reward/accuracy_mean", "rollout/format_fraction")


def main(argv: Sequence[str]) -> None:
    """Train a policy on verifiable rewards."""
    begun = time.monotonic()
    config, workdir = configuration.read(argv, command="rlvr")
    options = configuration.parse(rlvr_config.Config, config)
    devices = setup.open_devices(options.mesh, options.model)
    rollouts.require_one_process("rlvr")
    keys = running.keys(options.seed)
    with running.hold(workdir) as folder, jax.set_mesh(devices.mesh):
        files = setup.keep_files(options.model, folder)
        model = setup.open_model(options.model, devices, files=files, is_discriminator=False)
        identity = running.identity("rlvr", config, [model], may_differ=_MAY_DIFFER)
        if running.is_finished(folder, identity):
            return
        words, opened = open_prompts(options, files, folder=folder)
        shape = rlvr_update.shape_of(options, opened.sizes, devices)
        num_updates = options.train.num_steps * options.train.num_updates
        optimizer = setup.make_optimizer(options.optim, model.params, num_steps=num_updates)
        start = setup.start_of(model, optimizer, devices, key=keys.init)
        reference = rlvr_reference.open_reference(options.reference, model, devices, start)
        sampler = open_sampler(options, model, devices, words, opened)
        with options.rewards.open_judge() as judge:
            experience = rlvr_experience.Experience(
                options,
                devices,
                model,
                sampler=sampler,
                judge=judge,
                shape=shape,
                reference=None if reference is None else reference.params,
                dump=rollouts.Dump(folder, options.rollout.dump_every_steps),
            )
            running.run(
                running.Run(
                    identity=identity,
                    workdir=folder,
                    seed=options.seed,
                    key=keys.run,
                    begun=begun,
                    num_steps=options.train.num_steps,
                    evaluate_every_steps=None,
                    max_skipped_in_row=options.train.max_skipped_in_row,
                    watched=_WATCHED,
                    checkpoint=options.checkpoint,
                    resume=options.resume,
                    log=options.log,
                ),
                loop.Stage(
                    experience=experience,
                    update=rlvr_update.make(options, devices, model, optimizer, start, shape),
                    evaluate=None,
                    skip_counters=("optim/skipped_in_row",),
                ),
                open_feed(options, words, opened, sampler.reader, reference),
                abstract_state=start.abstract,
                make_state=start.make,
                summary={},
            )


def open_prompts(
    options: rlvr_config.Config, files: pathlib.Path, *, folder: pathlib.Path | None
) -> tuple[processor.Processor, asking.Opened]:
    """Return the processor and the validated prompts, each with a ground truth.

    Args:
      files: small files of the policy.
      folder: gets the list of the prompts that are left out.

    Raises:
      InputError: for wrong data, or fewer prompts than a step takes.
    """
    words = rollouts.processor_of(
        files, min_pixels=options.prompts.min_pixels, max_pixels=options.prompts.max_pixels
    )
    opened = sampled.open_prompts(
        options.prompts.path,
        options.prompts,
        words,
        need_teacher=False,
        need_answer=True,
        folder=folder,
    )
    prompt_mixture.require(opened, options.rollout.num_prompts, field="rollout.num_prompts")
    prompt_mixture.require(opened, _drawn_prompts(options), field="groups.generation_prompts")
    return words, opened


def open_sampler(
    options: rlvr_config.Config,
    model: setup.Model,
    devices: setup.Devices,
    words: processor.Processor,
    opened: asking.Opened,
) -> rollouts.Sampler:
    """Return the sampler for as many prompts as are drawn from together."""
    return rollouts.Sampler(
        dataclasses.replace(options.rollout, num_prompts=_drawn_prompts(options)),
        model,
        devices,
        words=words,
        sizes=opened.sizes,
        gate=options.rewards.judge,
    )


def open_feed(
    options: rlvr_config.Config,
    words: processor.Processor,
    opened: asking.Opened,
    reader: responses.Reader,
    reference: rlvr_reference.Reference | None,
) -> rlvr_groups.Feed:
    """Return the prompts of the run, and what its steps leave for one another."""

    def ask(indices: Sequence[int]) -> rlvr_groups.Prompts:
        rows = [opened.rows[index] for index in indices]
        return rlvr_groups.Prompts(
            indices=list(indices), rows=rows, prompts=rollouts.encode_prompts(rows, words)
        )

    is_refilled = options.groups.keep != "all"
    num_generations = options.groups.max_generations if is_refilled else 1
    is_adapted = options.reference.reward_target is not None
    return rlvr_groups.Feed(
        prompt_mixture.index_steps(
            opened,
            ask,
            weights=options.prompts.weights,
            num_prompts=_drawn_prompts(options),
            num_steps=options.train.num_steps * num_generations,
            seed=options.seed,
            num_threads=options.train.num_threads,
        ),
        num_prompts=options.rollout.num_prompts,
        is_refilled=is_refilled,
        coefficient=options.reference.reward_coefficient if is_adapted else None,
        reference=None if reference is None else reference.fingerprint,
        decode=functools.partial(rlvr_groups.decode, opened=opened, words=words, reader=reader),
    )


def _drawn_prompts(options: rlvr_config.Config) -> int:
    """Return how many prompts are drawn from together."""
    chosen = options.groups.generation_prompts
    return options.rollout.num_prompts if chosen is None else chosen
