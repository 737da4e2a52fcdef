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
from prism_jax import rows as packed_rows
from prism_jax.data import collate, encode, packing, processor, records, sources, steps, validate
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import lengths, segments
from prism_jax.first_fit import Extent
from prism_jax.honesty import panel as honesty_panel
from prism_jax.honesty import probes
from prism_jax.rows import Largest, RowShape
from prism_jax.setup import agreement, corpora, row_shapes
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.warmup import config as warmup_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Measured:
    size: encode.Size
    units: tuple[tuple[int, int], ...]  # tokens of teacher's and student's segment, by name
    is_held_out: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pair:
    """A row that is not yet read, and its sizes."""

    rows: sources.Rows
    index: int
    measured: _Measured


class Feed:
    """The pairs of each step, and the held-out pairs."""

    def __init__(
        self,
        options: warmup_config.Data,
        model: setup_models.Model,
        *,
        files: pathlib.Path,
        num_pairs: int,
        seed: int,
        folder: pathlib.Path,
        equal_min_tokens: int | None = None,
    ):
        """Open, validate and measure the pairs.

        Args:
          equal_min_tokens: see `discriminator.lengths`.

        Raises:
          InputError: for wrong data, or fewer pairs than a step takes.
        """
        if model.config.vision is None and (options.sees_images or not options.words):
            raise errors.InputError(
                "config.data: sees_images must be False and words a folder with the policy's "
                f"tokenizer for a model without vision, got {options.sees_images} and "
                f"{options.words!r}"
            )
        words = processor.Processor.from_folder(
            options.words or files,
            min_pixels=options.min_pixels,
            max_pixels=options.max_pixels,
            place="config.data.",
        )
        self._options, self._model, self._seed, self._num_pairs = options, model, seed, num_pairs
        self._equal_min_tokens = equal_min_tokens
        self._pixels_dtype = collate.pixels_dtype(words)
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
        self._train: list[_Pair] = []
        self._held_out: list[_Pair] = []
        for _, opened in parts:
            for index, (_, measured) in enumerate(opened.report.counted):
                side = self._held_out if measured.is_held_out else self._train
                side.append(_Pair(rows=opened.rows, index=index, measured=measured))
        # A resumed run with other rows would repeat or skip pairs: it is refused by this digest.
        self._digest = corpora.digest([opened.report for _, opened in parts])
        if len(self._train) < num_pairs:
            raise errors.InputError(
                f"config.train.num_pairs = {num_pairs}, but only {len(self._train)} pairs are to "
                f"learn from and {len(self._held_out)} are held out"
            )
        progress.say(f"{len(self._train)} pairs to learn from, {len(self._held_out)} held out")

    def _measure(self, row: records.PairRow) -> tuple[int, _Measured]:
        """Return the tokens of a row's longest sequence, and its sizes."""
        turns, media = segments.turns_of_pair(row), records.get_media(row)
        size = self._reader.measure(turns, media, sees_images=self._options.sees_images)
        cuts = self._cuts(row)
        # The same question about another picture is another prompt, on whichever side.
        prompt = row.prompt + "".join(file.sha256 or "" for file in records.get_files(row))
        measured = _Measured(
            size=size,
            units=tuple(
                tuple(len(cut.tokens[name]) for cut in cuts) for name in self._options.form.names
            ),
            # By the prompt itself: whatever else is added to the data, a prompt stays on its side.
            is_held_out=_fraction(prompt) < self._options.held_out_fraction,
        )
        return size.tokens + max(cut.longest for cut in cuts), measured

    def _cuts(self, row: records.PairRow) -> list[segments.Cut]:
        """Return the segments of teacher and student."""
        teacher, student = segments.texts_of_pair(row)
        cuts = [self._reader.teacher(teacher), self._reader.student(student)]
        if self._equal_min_tokens is None:
            return cuts
        teachers, students = lengths.cut_equally(
            cuts[:1], {0: cuts[1]}, {0: 0}, min_tokens=self._equal_min_tokens
        )
        return [teachers[0], students[0]]

    def largest(self) -> Largest:
        """Return the bounds of a step."""
        measured = [pair.measured for pair in (*self._train, *self._held_out)]
        return Largest(
            num_units=self._num_pairs * len(self._options.form.names),
            unit_sequences=2,
            unit_tokens=max(2 * m.size.tokens + sum(unit) for m in measured for unit in m.units),
            continued_tokens=max(sum(unit) for m in measured for unit in m.units),
            prompt_patches=max(m.size.patches for m in measured),
            prompt_frames=max(m.size.images for m in measured),
        )

    def num_steps(self, num_epochs: int) -> int:
        """Return the number of whole steps of `num_epochs`."""
        return num_epochs * len(self._train) // self._num_pairs

    def train(
        self,
        shape: RowShape,
        *,
        num_steps: int,
        inputs: agreement.Inputs,
        is_split_seen: bool,
    ) -> steps.Steps:
        """Return the batches of the run, each pair once an epoch.

        Args:
          inputs: gets a note of the pairs of each step, and of where they lie.
          is_split_seen: the training depends on the split into microbatches, see
            `row_shapes.Rows.num_rows`.
        """
        length = len(self._train)

        def make(step: int) -> discriminator_batch.SegmentBatch:
            pairs = []
            for place in range(step * self._num_pairs, (step + 1) * self._num_pairs):
                epoch, within = divmod(place, length)
                # The order follows from the seed and the epoch alone, so a resumed run needs no
                # other state.
                order = packing.epoch_order([length], [], seed=self._seed, epoch=epoch)
                pairs.append(self._train[int(order[within])])
            packed = self._packed(pairs, shape)
            inputs.note(step, [pair.index for pair in pairs], packed.places)
            return packed.batch

        identity = {
            "rows of config.data.train": self._digest,
            "num_train": length,
            "num_pairs": self._num_pairs,
            "seed": self._seed,
            row_shapes.SPLIT: shape.microbatch_rows if is_split_seen else None,
        }
        agreement.require_same("rows and settings of config.data", identity)
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
        """Return the evaluation of the held-out pairs; None without any."""
        starts = range(0, len(self._held_out), self._num_pairs)[:num_batches]
        if not starts:
            return None
        names = self._options.form.names

        def evaluate(state: Any, step: int) -> dict[str, float]:
            del step
            gaps = []
            for start in starts:
                packed = self._packed(self._held_out[start : start + self._num_pairs], shape)
                batch = devices.put(packed.batch, num_rows=shape.microbatch_rows)
                scores = packed.read(batches.to_host(score(state.params, batch)))
                # Teacher and student side by side, the names in turn.
                gaps.append(scores.reshape(-1, len(names), 2) @ np.float32([1, -1]))
            logged = {"eval/num_pairs": float(sum(map(len, gaps)))}
            for number, name in enumerate(names):
                of_name = np.concatenate(gaps)[:, number]
                logged[f"eval/{name}_pair_accuracy"] = float(np.mean(of_name > 0))
                logged[f"eval/{name}_gap"] = float(np.mean(of_name))
            return logged

        return evaluate

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the segments."""
        return self._options.form.names

    def held_out_pairs(self, num_rows: int) -> honesty_panel.Pairs:
        """Return the first held-out pairs."""
        return self._read(self._held_out[:num_rows])

    def probe_pairs(self, num_rows: int) -> dict[str, probes.Pairs]:
        """Return the first training pairs by segment, in the form of the probes."""
        cuts = [self._cuts(pair.rows[pair.index]) for pair in self._train[:num_rows]]
        return {
            name: probes.Pairs.of(
                range(len(cuts)),
                [teacher.tokens[name] for teacher, _ in cuts],
                [student.tokens[name] for _, student in cuts],
            )
            for name in self.names
        }

    def _read(self, pairs: Sequence[_Pair]) -> honesty_panel.Pairs:
        """Return prompts, and teacher's and student's segments side by side, names in turn."""
        form = self._options.form
        prompts, units, names, is_cut = [], [], [], []
        for pair in pairs:
            row = pair.rows[pair.index]
            cuts = self._cuts(row)
            for number, name in enumerate(form.names):
                units.append([segments.continuation(len(prompts), cut, name) for cut in cuts])
                names.append(number)
                is_cut.append(name in cuts[0].shortened)
            prompts.append(
                self._reader.prompt(
                    segments.turns_of_pair(row),
                    records.get_media(row),
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

    def _packed(
        self, pairs: Sequence[_Pair], shape: RowShape
    ) -> discriminator_batch.PackedSegments:
        """Return pairs in rows; of those that lie in other processes' rows only sizes are read."""
        form = self._options.form
        num_names = len(form.names)
        extents = [
            Extent(
                prompt=number,
                prompt_tokens=pair.measured.size.tokens,
                prompt_patches=pair.measured.size.patches,
                prompt_frames=pair.measured.size.images,
                continued=unit,
            )
            for number, pair in enumerate(pairs)
            for unit in pair.measured.units
        ]
        rows = packed_rows.place(extents, shape)
        local = sorted({extents[unit].prompt for row in shape.local_places for unit in rows[row]})
        read = self._read([pairs[number] for number in local])
        units = {
            local[place // num_names] * num_names + place % num_names: [
                dataclasses.replace(side, prompt=local[side.prompt]) for side in unit
            ]
            for place, unit in enumerate(read.units)
        }
        packed = packed_rows.pack_placed(
            dict(zip(local, read.prompts, strict=True)),
            units,
            extents,
            rows,
            shape,
            self._model.config,
            pixels_dtype=self._pixels_dtype,
        )
        return discriminator_batch.of_packed(
            packed,
            [name for _ in pairs for name in range(num_names)],
            form.kinds,
            shape,
            positions="mrope",
            is_paired=True,
        )


def _fraction(text: str) -> float:
    """Return a number in [0, 1) that follows from the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32
