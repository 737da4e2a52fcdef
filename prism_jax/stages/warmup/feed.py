"""The pairs of the warm-up: opened, cut into segments, set aside for evaluation, packed by step."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from prism_jax import batches, errors, progress
from prism_jax.data import encode, packing, processor, records, sources, steps, validate
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import segments
from prism_jax.honesty import panel as honesty_panel
from prism_jax.honesty import probes
from prism_jax.rows import Largest, RowShape
from prism_jax.setup import corpora, row_shapes
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.warmup import config as warmup_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Measured:
    size: encode.Size
    units: tuple[tuple[int, int], ...]  # tokens of teacher's and student's segment, by name
    is_held_out: bool


class Feed:
    """Give the pairs of each step, and those that are held out."""

    def __init__(
        self,
        options: warmup_config.Data,
        model: setup_models.Model,
        *,
        files: pathlib.Path,
        num_pairs: int,
        seed: int,
        folder: pathlib.Path,
    ):
        """Open, validate and measure the pairs.

        Raises:
          InputError: for wrong data, or fewer pairs than a step takes.
        """
        if model.config.vision is None and (options.sees_images or not options.words):
            raise errors.InputError(
                "config.data: sees_images must be False and words a folder with the policy's "
                f"tokenizer for a model without vision, got {options.sees_images} and "
                f"{options.words!r}"
            )
        words = processor.processor_of(
            pathlib.Path(options.words or files),
            min_pixels=options.min_pixels,
            max_pixels=options.max_pixels,
        )
        self._options, self._model, self._seed, self._num_pairs = options, model, seed, num_pairs
        self._reader = segments.Reader(
            words, vocab_tokens=model.config.text.vocab_size, gate=options.gate, form=options.form
        )
        parts = corpora.open_all(
            options.train,
            validate.Rules(
                max_bad_rows=options.max_bad_rows,
                option="config.data.max_bad_rows",
                count_tokens=self._measure,
                max_tokens=options.max_tokens,
                overlong=options.overlong,
                limit_pixels=options.limit_image_pixels,
                num_threads=options.num_threads,
            ),
            kind="pairs",
            image_root=options.image_root,
            cache_dir=options.cache_dir,
            dropped=folder / "dropped_train.jsonl",
        )
        self._train: list[tuple[sources.Rows, int]] = []
        self._held_out: list[tuple[sources.Rows, int]] = []
        self._measured: list[_Measured] = []
        for _, opened in parts:
            for index, (_, measured) in enumerate(opened.report.counted):
                side = self._held_out if measured.is_held_out else self._train
                side.append((opened.rows, index))
                self._measured.append(measured)
        self._digest = corpora.digest([opened.report for _, opened in parts])
        if len(self._train) < num_pairs:
            raise errors.InputError(
                f"config.train.num_pairs = {num_pairs}, but only {len(self._train)} pairs are to "
                f"learn from and {len(self._held_out)} are held out"
            )
        progress.say(f"{len(self._train)} pairs to learn from, {len(self._held_out)} held out")

    def _measure(self, row: records.PairRow) -> tuple[int, _Measured]:
        """Return the tokens of a row's longest sequence, and its sizes."""
        turns, pictures = segments.turns_of_pair(row), records.get_images(row)
        size = self._reader.measure(turns, pictures, sees_images=self._options.sees_images)
        cuts = self._cuts(row)
        prompt = row.prompt + "".join(image.sha256 or "" for image in pictures)
        measured = _Measured(
            size=size,
            units=tuple(
                tuple(len(cut.tokens[name]) for cut in cuts) for name in self._options.form.names
            ),
            is_held_out=_fraction(prompt) < self._options.held_out_fraction,
        )
        return size.tokens + max(cut.longest for cut in cuts), measured

    def _cuts(self, row: records.PairRow) -> list[segments.Cut]:
        """Return the segments of teacher and student."""
        teacher, student = segments.texts_of_pair(row)
        return [self._reader.teacher(teacher), self._reader.student(student)]

    def largest(self) -> Largest:
        """Return the bounds of a step."""
        known = self._measured
        return Largest(
            num_units=self._num_pairs * len(self._options.form.names),
            unit_sequences=2,
            unit_tokens=max(2 * one.size.tokens + sum(u) for one in known for u in one.units),
            continued_tokens=max(sum(unit) for one in known for unit in one.units),
            prompt_patches=max(one.size.patches for one in known),
            prompt_frames=max(one.size.images for one in known),
        )

    def num_steps(self, num_epochs: int) -> int:
        """Return the whole steps of so many epochs."""
        return num_epochs * len(self._train) // self._num_pairs

    def train(self, shape: RowShape, *, num_steps: int, is_split_seen: bool) -> steps.Steps:
        """Return the batches of the run, each pair once an epoch.

        Args:
          is_split_seen: the training depends on the split into microbatches, see
            `row_shapes.Rows.num_rows`.
        """
        length = len(self._train)

        def make(step: int) -> discriminator_batch.SegmentBatch:
            chosen = []
            for place in range(step * self._num_pairs, (step + 1) * self._num_pairs):
                epoch, within = divmod(place, length)
                order = packing.epoch_order([length], [], seed=self._seed, epoch=epoch)
                chosen.append(self._train[int(order[within])])
            return self._pack(chosen, shape).batch

        identity = {
            "rows of config.data.train": self._digest,
            "num_train": length,
            "num_pairs": self._num_pairs,
            "seed": self._seed,
            row_shapes.SPLIT: shape.microbatch_rows if is_split_seen else None,
        }
        return steps.Steps(
            make, num_steps=num_steps, identity=identity, num_threads=self._options.num_threads
        )

    def evaluation(
        self,
        score: Callable[[nnx.State, discriminator_batch.SegmentBatch], jax.Array],
        shape: RowShape,
        devices: devices_lib.Devices,
        *,
        num_batches: int | None,
    ) -> Callable[[Any, int], Mapping[str, float]] | None:
        """Return what measures the held-out pairs; None when there are none."""
        starts = range(0, len(self._held_out), self._num_pairs)[:num_batches]
        if not starts:
            return None
        names = self._options.form.names

        def evaluate(state: Any, step: int) -> dict[str, float]:
            del step
            gaps = []
            for start in starts:
                packed = self._pack(self._held_out[start : start + self._num_pairs], shape)
                batch = batches.to_devices(packed.batch, devices.mesh, devices.rules)
                found = packed.read(jax.device_get(score(state.params, batch)))
                # Teacher and student side by side, the names in turn.
                gaps.append(found.reshape(-1, len(names), 2) @ np.float32([1, -1]))
            told = {"eval/num_pairs": float(sum(map(len, gaps)))}
            for number, name in enumerate(names):
                of_name = np.concatenate(gaps)[:, number]
                told[f"eval/{name}_pair_accuracy"] = float(np.mean(of_name > 0))
                told[f"eval/{name}_gap"] = float(np.mean(of_name))
            return told

        return evaluate

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the segments."""
        return self._options.form.names

    def held_out_pairs(self, num_rows: int) -> honesty_panel.Pairs:
        """Return the first pairs that are held out."""
        return self._lay(self._held_out[:num_rows])

    def learnt_for_probes(self, num_rows: int) -> dict[str, probes.Pairs]:
        """Return what probes see of the first pairs that are learnt from, by segment."""
        cuts = [self._cuts(rows[index]) for rows, index in self._train[:num_rows]]
        return {
            name: probes.Pairs.of(
                range(len(cuts)),
                [teacher.tokens[name] for teacher, _ in cuts],
                [student.tokens[name] for _, student in cuts],
            )
            for name in self.names
        }

    def _lay(self, chosen: Sequence[tuple[sources.Rows, int]]) -> honesty_panel.Pairs:
        """Read pairs: prompts, and teacher's and student's segment side by side, names in turn."""
        form = self._options.form
        prompts, units, names, is_cut = [], [], [], []
        for rows, index in chosen:
            row = rows[index]
            cuts = self._cuts(row)
            for number, name in enumerate(form.names):
                units.append([segments.continuation(len(prompts), cut, name) for cut in cuts])
                names.append(number)
                is_cut.append(name in cuts[0].shortened)
            prompts.append(
                self._reader.prompt(
                    segments.turns_of_pair(row),
                    records.get_images(row),
                    sees_images=self._options.sees_images,
                )
            )
        return honesty_panel.Pairs(
            prompts=prompts,
            units=units,
            names=names,
            is_cut=is_cut,
            segments=form.names,
            kinds=form.kinds,
        )

    def _pack(
        self, chosen: Sequence[tuple[sources.Rows, int]], shape: RowShape
    ) -> discriminator_batch.PackedSegments:
        laid = self._lay(chosen)
        return discriminator_batch.pack(
            laid.prompts,
            laid.units,
            laid.names,
            laid.kinds,
            shape,
            self._model.config,
            positions="mrope",
        )


def _fraction(text: str) -> float:
    """Return a number in [0, 1) that follows from the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32
