"""Scores and router counts for the honesty panel, in the shapes that the stage has compiled."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import nnx

from prism_jax import batches
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.honesty import panel as honesty_panel
from prism_jax.honesty import router as honesty_router
from prism_jax.rows import RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models

Scorer = Callable[[nnx.State, discriminator_batch.SegmentBatch], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The rows into which a stage packs segments."""

    shape: RowShape
    positions: discriminator_batch.Positions
    is_paired: bool  # teacher and student of a pair share a row
    batch_pairs: int  # pairs of segments that fit a batch, whichever they are
    sees_images: bool


class Scoring:
    """The computation of scores and of the router's choices; nothing is compiled until it runs."""

    def __init__(
        self,
        model: setup_models.Model,
        devices: devices_lib.Devices,
        settings: discriminator_loss.Settings,
        score: Scorer,
        layout: Layout,
    ):
        self._model, self._devices, self._score, self._layout = model, devices, score, layout
        moe = model.config.text.moe
        self._count = None
        if moe is not None:
            self._count = honesty_router.make_counter(model.graphdef, settings)
        self._keeps_apart = model.config.score_heads > 1 or (
            moe is not None and moe.router == "segment"
        )

    def discriminator(self, params: nnx.State) -> honesty_panel.Discriminator:
        """Return the discriminator with these parameters, in the panel's form."""

        def score(pairs: honesty_panel.Pairs) -> np.ndarray:
            scores = [
                packed.read(batches.to_host(self._score(params, batch)))
                for packed, batch in self._batches(pairs)
            ]
            return np.concatenate(scores).reshape(-1, 2)

        def count(pairs: honesty_panel.Pairs) -> np.ndarray:
            counts = [self._count(params, batch) for _, batch in self._batches(pairs)]
            return np.sum(batches.to_host(counts), axis=0)

        vision = self._model.config.vision
        return honesty_panel.Discriminator(
            score=score,
            count=None if self._count is None else count,
            sees_images=self._layout.sees_images,
            keeps_apart=self._keeps_apart,
            spatial_merge_size=1 if vision is None else vision.spatial_merge_size,
        )

    def _batches(
        self, pairs: honesty_panel.Pairs
    ) -> Iterator[tuple[discriminator_batch.PackedSegments, discriminator_batch.SegmentBatch]]:
        layout = self._layout
        for start in range(0, len(pairs.units), layout.batch_pairs):
            part = slice(start, start + layout.batch_pairs)
            units, names = list(pairs.units[part]), list(pairs.names[part])
            if not layout.is_paired:
                # Teacher and student lie apart, as in the stage's batches.
                units = [[side] for side in itertools.chain.from_iterable(units)]
                names = [name for name in names for _ in range(2)]
            packed = discriminator_batch.segment_rows(
                pairs.prompts,
                units,
                names,
                pairs.kinds,
                layout.shape,
                self._model.config,
                positions=layout.positions,
            )
            yield packed, self._devices.put(packed.batch, num_rows=layout.shape.microbatch_rows)
