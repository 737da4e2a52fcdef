"""Stage 1, supervised fine-tuning: `python -m prism_jax sft --config=configs/sft.py:4b …`.

Demonstrations are packed into rows of `data.row_tokens` tokens with their images, and the policy
learns the assistant's tokens alone. A step has `train.num_microbatches` microbatches of
`train.num_rows` rows; how it is split does not change it. Runs on TPU, GPU or CPU; configs/sft.py
names sizes, hardware and sources.
"""

import functools
import time
from collections.abc import Sequence

import jax

from prism_jax import configuration
from prism_jax.running import loop
from prism_jax.running import run as run_lib
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.sft import config as sft_config
from prism_jax.stages.sft import feed as sft_feed
from prism_jax.stages.sft import step as sft_step
from prism_jax.training import train_step

# May change between a run and its continuation.
_MAY_DIFFER = ("data.cache_dir", "data.num_threads", "data.cache_mebibytes", "evaluate")


def main(argv: Sequence[str]) -> None:
    """Train a policy on demonstrations."""
    begun = time.monotonic()
    config, workdir = configuration.read(argv, command="sft")
    options = configuration.parse(sft_config.Config, config)
    devices = devices_lib.open_devices(options.mesh, options.model)
    keys = run_lib.keys(options.seed)
    with run_lib.hold(workdir) as folder, jax.set_mesh(devices.mesh):
        files = setup_models.keep_files(options.model, folder)
        model = setup_models.open_model(options.model, devices, files=files, is_discriminator=False)
        identity = run_lib.identity("sft", config, [model], may_differ=_MAY_DIFFER)
        if run_lib.is_finished(folder, identity):
            return
        feed = sft_feed.Feed(
            options,
            devices,
            model,
            words=sft_feed.open_words(options.data, files),
            folder=folder,
        )
        num_steps = options.train.num_steps or feed.num_steps(options.train.num_epochs)
        data = feed.train(num_steps)
        optimizer = setup_models.make_optimizer(options.optim, model.params, num_steps=num_steps)
        start = setup_models.start_of(model, optimizer, devices, key=keys.init)
        loss_fn = sft_step.make_loss(options, devices)
        update = train_step.make_train_step(
            model.graphdef,
            loss_fn,
            optimizer,
            weights_fn=functools.partial(
                sft_step.weights, has_router=model.config.text.moe is not None
            ),
            coefficients=sft_step.coefficients(options.train, model),
            num_microbatches=options.train.num_microbatches,
            shardings=start.shardings,
        )
        run_lib.run(
            run_lib.Run(
                identity=identity,
                workdir=folder,
                seed=options.seed,
                key=keys.run,
                begun=begun,
                num_steps=num_steps,
                evaluate_every_steps=options.evaluate.every_steps,
                max_skipped_in_row=options.train.max_skipped_in_row,
                watched=("loss/nll", "eval/nll", "optim/learning_rate"),
                checkpoint=options.checkpoint,
                resume=options.resume,
                log=options.log,
            ),
            loop.Stage(
                experience=loop.learn_from_data,
                update=update,
                evaluate=feed.evaluation(model.graphdef, loss_fn),
                skip_counters=("optim/skipped_in_row",),
            ),
            data,
            abstract_state=start.abstract,
            make_state=start.make,
            summary={},
        )
