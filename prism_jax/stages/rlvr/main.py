"""Stage 3, RL with verifiable rewards: `python -m prism_jax rlvr --config=configs/rlvr.py:4b …`.

    prompts ─→ policy ─→ responses ─→ judge ─→ rewards ─→ advantages ─→ updates of the policy
       ↑                                 │                    ↑              ↑
       └── until enough groups vary ─────┘                    └─ reference policy ─┘   (off)

Each step draws responses to some prompts, rewards them by their answers (0.8) and their format
(0.2), compares each reward with those of the other responses to its prompt, and updates the policy:
once, strictly on-policy, or several times. Which algorithm that is, the configuration says; see
`stages.rlvr.config`.

`config.model.folder` is the aligned policy: the workdir of `align` (or `sft`), or a Hugging Face
folder. Runs on TPU, GPU or CPU; configs/rlvr.py names sizes, hardware and sources.
"""

import dataclasses
from collections.abc import Sequence

from prism_jax.data import processor
from prism_jax.policy import rollouts
from prism_jax.running import dump as running_dump
from prism_jax.running import loop
from prism_jax.running import run as run_lib
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import prompts as prompts_lib
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import feed as rlvr_feed
from prism_jax.stages.rlvr import reference as rlvr_reference
from prism_jax.stages.rlvr import step as rlvr_step
from prism_jax.stages.rlvr import updates as rlvr_updates

_WATCHED = ("reward/total_mean", "reward/accuracy_mean", "rollout/format_fraction")


def main(argv: Sequence[str]) -> None:
    """Train a policy on verifiable rewards."""
    with run_lib.opened(argv, "rlvr", rlvr_config.Config) as run:
        options, devices = run.options, run.devices
        devices_lib.require_one_process("rlvr")
        files = setup_models.keep_files(options.model, run.folder)
        model = setup_models.open_model(options.model, devices, files=files, is_discriminator=False)
        identity = run.identity(model)
        if run.is_finished(identity):
            return
        words, opened = rlvr_feed.open_prompts(options, files, folder=run.folder)
        shape = rlvr_updates.shape_of(options, opened.sizes, devices)
        num_updates = options.train.num_steps * options.train.num_updates
        optimizer = setup_models.make_optimizer(options.optim, model.params, num_steps=num_updates)
        start = setup_models.start_of(model, optimizer, devices, key=run.keys.init)
        reference = rlvr_reference.open_reference(options.reference, model, devices, start)
        sampler = open_sampler(options, model, devices, words, opened)
        feed = rlvr_feed.open_feed(options, words, opened, sampler.reader, reference)
        with options.rewards.open_judge() as judge:
            experience = rlvr_step.Experience(
                options,
                devices,
                model,
                sampler=sampler,
                judge=judge,
                shape=shape,
                reference=None if reference is None else reference.params,
                dump=running_dump.Dump(run.folder, options.rollout.dump_every_steps),
            )
            run.train(
                identity,
                loop.Stage(
                    experience=experience,
                    update=rlvr_updates.make(options, devices, model, optimizer, start, shape),
                    evaluate=None,
                    skip_counters=("optim/skipped_in_row",),
                ),
                feed,
                start,
                limits=loop.Limits(
                    num_steps=options.train.num_steps,
                    evaluate_every_steps=None,
                    max_skipped_in_row=options.train.max_skipped_in_row,
                ),
                watched=_WATCHED,
            )


def open_sampler(
    options: rlvr_config.Config,
    model: setup_models.Model,
    devices: devices_lib.Devices,
    words: processor.Processor,
    opened: prompts_lib.Opened,
) -> rollouts.Sampler:
    """Return the sampler for as many prompts as are drawn from together."""
    return rollouts.Sampler(
        dataclasses.replace(options.rollout, num_prompts=rlvr_feed._drawn_prompts(options)),
        model,
        devices,
        words=words,
        sizes=opened.sizes,
        gate=options.rewards.judge,
    )
