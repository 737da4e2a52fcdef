"""Discriminator warm-up: `python -m prism_jax warmup --config=configs/warmup.py:4b --workdir=…`.

The discriminator learns to score a teacher's segment above a student's: the mean of
−log σ(teacher − student) over the pairs of captions and of cots (or of what `data.view` says), with
a term that keeps the router's experts in use. Held-out pairs tell how often it is right. Alignment
goes on from its workdir.

`config.model.folder` is the trunk: a mixture of experts that `upcycle` wrote (the method), a dense
model, or the workdir of a stage, each with a new score head; or a discriminator to train further,
also that of an alignment's workdir. With `data.sees_images = False` it reads texts alone (the
paper's ablation). Runs on TPU, GPU or CPU; configs/warmup.py names sizes, hardware and sources.

Source: PRISM moe/train_moe_vl_warmup_fast.py.
"""

import dataclasses
from collections.abc import Sequence

from prism_jax.checkpoints import model_files
from prism_jax.running import loop
from prism_jax.running import run as run_lib
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.warmup import config as warmup_config
from prism_jax.stages.warmup import feed as warmup_feed
from prism_jax.stages.warmup import honesty as warmup_honesty
from prism_jax.stages.warmup import start as warmup_start
from prism_jax.stages.warmup import step as warmup_step


def main(argv: Sequence[str]) -> None:
    """Train a discriminator on pairs."""
    with run_lib.opened(argv, "warmup", warmup_config.Config) as run:
        options, devices = run.options, run.devices
        devices_lib.require_one_process("warmup")
        # If the folder is an alignment run, take the discriminator's files, not the policy's.
        source = str(model_files.of(options.model.folder, is_discriminator=True))
        files = setup_models.keep_files(
            dataclasses.replace(options.model, folder=source), run.folder
        )
        model = setup_models.open_model(options.model, devices, files=files, is_discriminator=True)
        identity = run.identity(model)
        if run.is_finished(identity):
            return
        feed = warmup_feed.Feed(
            options.data,
            model,
            files=files,
            num_pairs=options.train.num_pairs,
            seed=options.seed,
            folder=run.folder,
        )
        shape = options.rows.shape(feed.largest(), devices, place="config.rows")
        num_steps = options.train.num_steps or feed.num_steps(options.train.num_epochs)
        optimizer = setup_models.make_optimizer(options.optim, model.params, num_steps=num_steps)
        start = warmup_start.start_of(model, optimizer, devices, key=run.keys.init)
        names = options.data.form.names
        run.train(
            identity,
            warmup_step.make_stage(
                options, devices, model, feed, optimizer, start, shape, num_steps=num_steps
            ),
            run_lib.OnDevices(
                feed.train(
                    shape, num_steps=num_steps, is_split_seen=options.pairs.is_split_seen(model)
                ),
                devices,
            ),
            start,
            limits=loop.Limits(
                num_steps=num_steps,
                evaluate_every_steps=warmup_honesty.every_steps(
                    options.evaluate.every_steps, options.honesty.every_steps
                ),
                max_skipped_in_row=options.train.max_skipped_in_row,
            ),
            watched=("loss/total", *(f"eval/{name}_pair_accuracy" for name in names)),
        )
