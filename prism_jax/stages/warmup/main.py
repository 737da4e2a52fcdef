"""Discriminator warm-up: `python -m prism_jax warmup --config=configs/warmup.py:4b --workdir=…`.

The discriminator learns to score a teacher's segment above a student's: the mean of
−log σ(teacher − student) over the pairs of captions and of cots (or the segments of `data.view`),
with a term that keeps the router's experts in use. Held-out pairs measure its accuracy. Alignment
continues from its workdir. `step.py` is the step itself.

`config.model.folder` is the trunk: a mixture of experts that `upcycle` wrote (the method), a dense
model, or the workdir of a stage, each with a new score head; or a discriminator to train further,
also that of an alignment's workdir. With `data.sees_images = False` it reads texts alone (the
paper's ablation). Runs on TPU, GPU or CPU; configs/warmup.py names sizes, hardware and sources.

Source: PRISM moe/train_moe_vl_warmup_fast.py.
"""

from collections.abc import Sequence

from prism_jax.running import loop
from prism_jax.running import run as run_lib
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
        # Of an alignment run, the discriminator's files.
        files = setup_models.keep_files(options.model, run.folder, is_discriminator=True)
        model = setup_models.open_model(options.model, devices, files=files, is_discriminator=True)
        options.rows.check_router(model.config, place="config.rows")
        identity = run.identity(model)
        # Before data and weights are read, which a finished run does not need.
        if run.is_finished(identity):
            return
        feed = warmup_feed.Feed(
            options.data,
            model,
            files=files,
            num_pairs=options.train.num_pairs,
            seed=options.seed,
            folder=run.folder,
            equal_min_tokens=options.pairs.lengths.equal_min_tokens,
        )
        # The rows are those of the largest pairs, so that one program serves every step.
        shape = options.rows.shape(feed.largest(), devices, shared_units=1, place="config.rows")
        num_steps = options.train.num_steps or feed.num_steps(options.train.num_epochs)
        optimizer = setup_models.make_optimizer(options.optim, model.params, num_steps=num_steps)
        start = warmup_start.start_of(model, optimizer, devices, key=run.keys.init)
        names = options.data.form.names
        run.train(
            identity,
            loop.Stage(
                experience=loop.learn_from_data,
                update=warmup_step.make_update(options, devices, model, optimizer, start, shape),
                evaluate=warmup_honesty.open_evaluation(
                    options, devices, model, feed, shape, num_steps=num_steps
                ),
                skip_counters=("optim/skipped_in_row",),
            ),
            run_lib.OnDevices(
                feed.train(
                    shape,
                    num_steps=num_steps,
                    inputs=run.inputs,
                    is_split_seen=options.pairs.is_split_seen(model),
                ),
                devices,
                num_rows=shape.microbatch_rows,
            ),
            start,
            limits=loop.Limits(
                num_steps=num_steps,
                # The loop knows one interval; the evaluation itself decides what is due.
                evaluate_every_steps=warmup_honesty.every_steps(
                    options.evaluate.every_steps, options.honesty.every_steps
                ),
                max_skipped_in_row=options.train.max_skipped_in_row,
            ),
            watched=("loss/total", *(f"eval/{name}_pair_accuracy" for name in names)),
        )
