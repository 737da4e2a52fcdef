"""The pairs of the warm-up: opened, cut into segments, set aside for evaluation, packed by step."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from prism_jax import batches, configuration, discriminator_update, errors
from prism_jax.continuations import Largest, RowShape
from prism_jax.data import encode, packing, records, sources, steps, validate
from prism_jax.stages import corpora, rollouts, segments, setup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(configuration.Section):
    """Say which pairs, and how the discriminator reads them."""

    train: tuple[str, ...]  # JSONL files, folders of them, or folders that `data build` wrote
    held_out_fraction: float  # of the prompts, for evaluation; a prompt is on one side only
    image_root: str  # of relative image paths; empty: the folder of the file
    cache_dir: str  # for built data sets on gs://
    max_bad_rows: int
    overlong: Literal["error", "filter"]  # what happens to longer rows
    max_tokens: int  # of a prompt with one segment
    min_pixels: int | None  # of a picture, others are scaled; None: as the model's folder says
    max_pixels: int | None
    sees_images: bool  # False: prompts are read without their pictures
    num_threads: int

    def problems(self) -> list[str]:
        """See `Section`."""
        found = configuration.not_empty(self, "train")
        found += configuration.at_least(self, 1, "max_tokens", "num_threads")
        if not 0 <= self.held_out_fraction < 1:
            found.append(f"held_out_fraction must be in [0, 1), got {self.held_out_fraction}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Measured:
    size: encode.Size
    units: tuple[tuple[int, int], ...]  # tokens of teacher's and student's segment, by name
    is_held_out: bool
    digest: str


class Feed:
    """Give the pairs of each step, and those that are held out."""

    def __init__(
        self,
        options: Data,
        model: setup.Model,
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
        words = rollouts.processor_of(
            files, min_pixels=options.min_pixels, max_pixels=options.max_pixels
        )
        self._options, self._model, self._seed, self._num_pairs = options, model, seed, num_pairs
        self._reader = segments.Reader(
            words, vocab_tokens=model.config.text.vocab_size, gate="strict"
        )
        self._measured: dict[tuple[str, str], _Measured] = {}
        parts = corpora.open_all(
            options.train,
            validate.Rules(
                max_bad_rows=options.max_bad_rows,
                count_tokens=self._count_tokens,
                max_tokens=options.max_tokens,
                overlong=options.overlong,
                num_threads=options.num_threads,
            ),
            kind="pairs",
            image_root=options.image_root,
            cache_dir=options.cache_dir,
            dropped=folder / "dropped_train.jsonl",
        )
        self._train: list[tuple[sources.Rows, int]] = []
        self._held_out: list[tuple[sources.Rows, int]] = []
        for _, rows in parts:
            for index in range(len(rows)):
                known = self._measured[_key(rows[index])]
                (self._held_out if known.is_held_out else self._train).append((rows, index))
        if len(self._train) < num_pairs:
            raise errors.InputError(
                f"config.train.num_pairs = {num_pairs}, but only {len(self._train)} pairs are to "
                f"learn from and {len(self._held_out)} are held out"
            )
        setup.say(f"{len(self._train)} pairs to learn from, {len(self._held_out)} held out")

    def _count_tokens(self, row: records.PairRow) -> int:
        """Measure a row; return the tokens of its longest sequence."""
        turns, pictures = segments.turns_of_pair(row), records.get_images(row)
        size = self._reader.measure(turns, pictures, sees_images=self._options.sees_images)
        cuts = [self._reader.cut(text) for text in segments.texts_of_pair(row)]
        prompt = row.prompt + "".join(image.sha256 or "" for image in pictures)
        texts = repr((prompt, segments.texts_of_pair(row)))
        self._measured[_key(row)] = _Measured(
            size=size,
            units=tuple(tuple(len(cut.segment(name)) for cut in cuts) for name in segments.NAMES),
            is_held_out=_fraction(prompt) < self._options.held_out_fraction,
            digest=hashlib.sha256(texts.encode()).hexdigest(),
        )
        return size.tokens + max(cut.longest for cut in cuts)

    def largest(self) -> Largest:
        """Return the bounds of a step."""
        known = list(self._measured.values())
        return Largest(
            num_units=self._num_pairs * len(segments.NAMES),
            unit_sequences=2,
            unit_tokens=max(2 * one.size.tokens + sum(u) for one in known for u in one.units),
            continued_tokens=max(sum(unit) for one in known for unit in one.units),
            prompt_patches=max(one.size.patches for one in known),
            prompt_frames=max(one.size.images for one in known),
        )

    def num_steps(self, num_epochs: int) -> int:
        """Return the whole steps of so many epochs."""
        return num_epochs * len(self._train) // self._num_pairs

    def train(self, shape: RowShape, *, num_steps: int) -> steps.Steps:
        """Return the batches of the run, each pair once an epoch."""
        length = len(self._train)

        def make(step: int) -> discriminator_update.SegmentBatch:
            chosen = []
            for place in range(step * self._num_pairs, (step + 1) * self._num_pairs):
                epoch, within = divmod(place, length)
                order = packing.epoch_order([length], [], seed=self._seed, epoch=epoch)
                chosen.append(self._train[int(order[within])])
            return self._pack(chosen, shape).batch

        digests = "".join(sorted(one.digest for one in self._measured.values()))
        identity = {
            "pairs": hashlib.sha256(digests.encode()).hexdigest()[:16],
            "num_train": length,
            "num_pairs": self._num_pairs,
            "seed": self._seed,
        }
        return steps.Steps(
            make, num_steps=num_steps, identity=identity, num_threads=self._options.num_threads
        )

    def evaluation(
        self,
        score: Callable[[nnx.State, discriminator_update.SegmentBatch], jax.Array],
        shape: RowShape,
        devices: setup.Devices,
        *,
        num_batches: int | None,
    ) -> Callable[[Any, int], Mapping[str, float]] | None:
        """Return what measures the held-out pairs; None when there are none."""
        starts = range(0, len(self._held_out), self._num_pairs)[:num_batches]
        if not starts:
            return None

        def evaluate(state: Any, step: int) -> dict[str, float]:
            del step
            gaps = []
            for start in starts:
                packed = self._pack(self._held_out[start : start + self._num_pairs], shape)
                batch = batches.to_devices(packed.batch, devices.mesh, devices.rules)
                found = packed.read(jax.device_get(score(state.params, batch)))
                # Teacher and student side by side, the names in turn.
                gaps.append(found.reshape(-1, len(segments.NAMES), 2) @ np.float32([1, -1]))
            told = {"eval/num_pairs": float(sum(map(len, gaps)))}
            for number, name in enumerate(segments.NAMES):
                of_name = np.concatenate(gaps)[:, number]
                told[f"eval/{name}_pair_accuracy"] = float(np.mean(of_name > 0))
                told[f"eval/{name}_gap"] = float(np.mean(of_name))
            return told

        return evaluate

    def _pack(
        self, chosen: Sequence[tuple[sources.Rows, int]], shape: RowShape
    ) -> discriminator_update.PackedSegments:
        prompts, units, names = [], [], []
        for rows, index in chosen:
            row = rows[index]
            cuts = [self._reader.cut(text) for text in segments.texts_of_pair(row)]
            for number, name in enumerate(segments.NAMES):
                units.append([segments.continuation(len(prompts), cut, name) for cut in cuts])
                names.append(number)
            prompts.append(
                self._reader.prompt(
                    segments.turns_of_pair(row),
                    records.get_images(row),
                    sees_images=self._options.sees_images,
                )
            )
        return discriminator_update.pack(prompts, units, names, shape, self._model.config)


def _key(row: records.PairRow) -> tuple[str, str]:
    return row.source, row.id


def _fraction(text: str) -> float:
    """Return a number in [0, 1) that follows from the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32
