"""Stage 2, alignment: `python -m prism_jax align --config=configs/align.py:4b --workdir=…`.

    prompts ─→ policy ─→ responses ─→ caption, cot ─┐
                 ↑                                  ├─→ discriminator ─→ scores ─→ advantages ─┐
                 │        teacher ─→ caption, cot ──┘         ↑               │                │
                 │                                            └── teacher above student       │
                 └───────────────────────── policy gradient ←──────────────────────────────────┘

Each step draws responses from the policy, cuts them into caption and cot (or into what
`discriminator.view` says), and lets the discriminator score them. What a response scores above the
others to its prompt is its advantage; a malformed one pays a penalty. `advantage.mode` names one of
the six ways of `losses.advantage`; all but the default ask the judge for right and wrong. Then the
discriminator learns to put the teacher's segments above the policy's, and the policy learns from
the advantages. There is no reference policy and no KL term.

The discriminator scores before it learns, each of the teacher's segments once a prompt; those same
scores give the gradient of its update, see `discriminator.loss`. Where it learns several times in
a step, or with dropout, each update has scores of its own. `pace` says how often each model learns.

`config.model.folder` is the policy: the workdir of `sft`, or a Hugging Face folder;
`config.discriminator.folder` the workdir of `warmup`, or a folder with a score head. Runs on TPU,
GPU or CPU; configs/align.py names sizes, hardware and sources.
"""

import contextlib
import functools
from collections.abc import Sequence

from prism_jax.checkpoints import model_files
from prism_jax.running import dump as running_dump
from prism_jax.running import loop
from prism_jax.running import run as run_lib
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.align import config as align_config
from prism_jax.stages.align import feed as align_feed
from prism_jax.stages.align import step as align_step
from prism_jax.stages.align import updates as align_updates


def main(argv: Sequence[str]) -> None:
    """Align a policy with a teacher of which only the texts are known."""
    with run_lib.opened(argv, "align", align_config.Config) as run, contextlib.ExitStack() as stack:
        options, devices = run.options, run.devices
        devices_lib.require_one_process("align")
        source = options.discriminator.model(options.model)
        files = setup_models.keep_files(options.model, run.folder)
        discriminator_files = setup_models.keep_files(
            source, run.folder, name=model_files.DISCRIMINATOR_FOLDER
        )
        policy = setup_models.open_model(
            options.model, devices, files=files, is_discriminator=False
        )
        discriminator = setup_models.open_model(
            source, devices, files=discriminator_files, is_discriminator=True
        )
        identity = run.identity(policy, discriminator)
        if run.is_finished(identity):
            return
        feed = align_feed.Feed(
            options,
            policy,
            discriminator,
            run.folder,
            files=files,
            discriminator_files=discriminator_files,
        )
        shapes = feed.shapes(devices)
        starts, updates = align_updates.open_updates(
            options, devices, policy, discriminator, shapes, key=run.keys.init
        )
        experience = align_step.Experience(
            *(options, devices, policy, discriminator),
            feed=feed,
            shapes=shapes,
            judge=stack.enter_context(options.judge.open())
            if options.advantage.asks_judge
            else None,
            dump=running_dump.Dump(run.folder, options.rollout.dump_every_steps),
        )
        gaps = (f"discriminator/{name}_gap" for name in options.discriminator.form.names)
        run.train(
            identity,
            loop.Stage(
                experience=experience,
                update=functools.partial(align_step.update, updates, options.pace),
                evaluate=None,
                skip_counters=tuple(f"optim/{name}_skipped_in_row" for name in starts),
            ),
            feed.train(),
            setup_models.together(starts),
            limits=loop.Limits(
                num_steps=options.train.num_steps,
                evaluate_every_steps=None,
                max_skipped_in_row=options.train.max_skipped_in_row,
            ),
            watched=(*gaps, "rollout/format_fraction", "rollout/response_tokens_mean"),
        )
