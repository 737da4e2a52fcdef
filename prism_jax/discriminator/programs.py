"""The discriminator's batches as abstract arrays; see `setup.programs`."""

from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.rows import RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import programs


def batch(
    model: setup_models.Model,
    devices: devices_lib.Devices,
    shape: RowShape,
    *,
    is_paired: bool,
    positions: discriminator_batch.Positions,
) -> discriminator_batch.SegmentBatch:
    """Return the abstract rows of a step.

    Args:
      is_paired: teacher's and student's segments stand side by side, see `batch.segment_rows`.
    """
    one = programs.continuation()
    packed = discriminator_batch.segment_rows(
        [programs.example()],
        [[one, one] if is_paired else [one]],
        [0],
        [0],
        programs.one_row(shape),
        model.config,
        positions=positions,
    )
    return programs.expand(
        packed.batch, devices, num_microbatches=shape.num_microbatches, rows=shape.microbatch_rows
    )


def work(model: setup_models.Model, shape: RowShape) -> programs.Work:
    """Return the work of scoring all rows of a step."""
    return programs.Work(
        model=model.config,
        **programs.tokens_of(shape),
        sequence_tokens=shape.row_tokens,
        patches=shape.microbatch_rows * shape.row_patches,
        head_tokens=0,
        calls=shape.num_microbatches,
        has_gradient=False,
        is_decoding=False,
    )
