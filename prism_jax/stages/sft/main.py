"""Stage 1, supervised fine-tuning: `python -m prism_jax sft --config=configs/sft.py:4b …`.

Demonstrations are packed into rows of `data.row_tokens` tokens with their images, and the policy
learns the assistant's tokens alone. A step has `train.step_rows` rows, in microbatches of
`train.num_rows`; the split into microbatches does not change it. `step.py` is the step itself. Runs
on TPU, GPU or CPU; configs/sft.py names sizes, hardware and sources.
"""

from collections.abc import Sequence

from prism_jax.running import loop
from prism_jax.running import run as run_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.sft import config as sft_config
from prism_jax.stages.sft import feed as sft_feed
from prism_jax.stages.sft import step as sft_step


def main(argv: Sequence[str]) -> None:
    """Train a policy on demonstrations."""
    with run_lib.opened(argv, "sft", sft_config.Config) as run:
        options, devices = run.options, run.devices
        files = setup_models.keep_files(options.model, run.folder)
        model = setup_models.open_model(options.model, devices, files=files, is_discriminator=False)
        identity = run.identity(model)
        # Before data and weights are read, which a finished run does not need.
        if run.is_finished(identity):
            return
        feed = sft_feed.Feed(options, devices, model, files=files, folder=run.folder)
        # An epoch's steps are known only when all rows are measured and packed.
        num_steps = options.train.num_steps or feed.num_steps(options.train.num_epochs)
        data = feed.train(num_steps, inputs=run.inputs)
        optimizer = setup_models.make_optimizer(options.optim, model.params, num_steps=num_steps)
        start = setup_models.start_of(model, optimizer, devices, key=run.keys.init)
        loss_fn = sft_step.make_loss(options, devices)
        run.train(
            identity,
            loop.Stage(
                experience=loop.learn_from_data,
                update=sft_step.make_update(options, devices, model, loss_fn, optimizer, start),
                evaluate=feed.evaluation(model.graphdef, loss_fn),
                skip_counters=("optim/skipped_in_row",),
            ),
            data,
            start,
            limits=loop.Limits(
                num_steps=num_steps,
                evaluate_every_steps=options.evaluate.every_steps,
                max_skipped_in_row=options.train.max_skipped_in_row,
            ),
            watched=("loss/nll", "eval/nll", "optim/learning_rate"),
        )
