"""The programs of supervised fine-tuning; see `setup.programs`."""

from collections.abc import Mapping

import numpy as np

from prism_jax import batches
from prism_jax.data import collate
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import programs
from prism_jax.stages.sft import config as sft_config
from prism_jax.stages.sft import step as sft_step


def programs_of(
    options: sft_config.Config,
    devices: devices_lib.Devices,
    models: Mapping[str, setup_models.Model],
    bounds: programs.Bounds,
) -> list[programs.Program]:
    """Return the update with the largest vision rows."""
    del bounds  # rows are as the configuration says
    model, data = models["policy"], options.data
    optimizer = setup_models.make_optimizer(options.optim, model.params, num_steps=1000)
    start = setup_models.start_of(model, optimizer, devices, key=programs.key())
    count, rows = options.microbatches(devices.layout())
    batch = _batch(options, devices, model)
    loss_fn = sft_step.make_loss(options, devices)
    return [
        programs.Program(
            phase="update",
            devices=devices,
            function=sft_step.make_update(options, devices, model, loss_fn, optimizer, start),
            arguments=(start.abstract, batch, programs.key()),
            static={},
            parts=programs.state_parts(start.abstract) | {"batch": batch},
            beside={},
            gradients=programs.trainable(optimizer, start.abstract),
            work=programs.Work(
                model=model.config,
                tokens=rows * data.row_tokens,
                attended_tokens=rows * data.row_tokens,
                # Attention skips nothing of a packed row: the kernels only mask.
                sequence_tokens=data.row_tokens,
                patches=rows * max(data.row_patches, default=0),
                head_tokens=rows * data.row_tokens,
                head_chunk_tokens=options.train.head_chunk_tokens,
                calls=count,
                has_gradient=True,
                is_decoding=False,
                remat=options.model.remat,
            ),
        )
    ]


def _batch(
    options: sft_config.Config, devices: devices_lib.Devices, model: setup_models.Model
) -> batches.SFTBatch:
    """Return the abstract rows of a step, with the largest vision rows."""
    data, example = options.data, programs.example()
    shapes = collate.Shapes(
        row_tokens=data.row_tokens,
        row_examples=data.row_examples,
        row_patches=data.row_patches,
        row_images=data.row_images,
    )
    text, vision = collate.collate(
        [[example]],
        config=model.config,
        shapes=shapes,
        # A step takes the smallest of these sizes that its pictures fit into.
        row_patches=max(data.row_patches, default=None),
        segments=shapes.segments_for(data.row_examples, data.row_images),
        dtype=np.dtype(np.uint8),
    )
    is_assistant = collate.lay(
        [[np.ones(len(example.tokens), bool)]], row_tokens=data.row_tokens, dtype=np.dtype(bool)
    )
    count, rows = options.microbatches(devices.layout())
    return programs.expand(
        batches.split(
            batches.SFTBatch(text=text, vision=vision, is_assistant=is_assistant),
            num_microbatches=1,
        ),
        devices,
        num_microbatches=count,
        rows=rows,
    )
