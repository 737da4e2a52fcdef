"""The packed batches of supervised fine-tuning, to train on and to evaluate on."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from prism_jax import batches, errors, progress
from prism_jax.data import collate, demonstrations, packing, processor, steps, validate
from prism_jax.losses import reduce
from prism_jax.running import run as run_lib
from prism_jax.setup import corpora, row_shapes
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.sft import config as sft_config
from prism_jax.training import train_step


def open_words(data: sft_config.Data, files: pathlib.Path) -> processor.Processor:
    """Return the processor of the model, its bounds on images as configured."""
    words = processor.Processor.from_folder(files)
    changes = {"min_pixels": data.min_pixels, "max_pixels": data.max_pixels}
    changes = {name: value for name, value in changes.items() if value is not None}
    settings = dataclasses.replace(words.image_settings, **changes)
    return dataclasses.replace(words, image_settings=settings)


class Feed:
    """Give the packed batches of the stage, to train on and to evaluate on."""

    def __init__(
        self,
        options: sft_config.Config,
        devices: devices_lib.Devices,
        model: setup_models.Model,
        *,
        words: processor.Processor,
        folder: pathlib.Path,
    ):
        """Open, validate and measure the demonstrations.

        Raises:
          InputError: for wrong data, fewer demonstrations than rows in a step, or rows that do
            not divide over the devices.
        """
        data = options.data
        self._options, self._devices, self._model, self._words = options, devices, model, words
        self._shapes = collate.Shapes(
            row_tokens=data.row_tokens,
            row_examples=data.row_examples,
            row_patches=data.row_patches,
            row_images=data.row_images,
        )
        if devices.rules.mesh_axes("images") != devices.rules.mesh_axes("batch"):
            raise errors.InputError("config.mesh.rules: images must lie as batch does")
        self._num_microbatches, self._num_rows = options.microbatches(devices.layout())
        self._rows = batches.local_rows(self._num_rows, devices.mesh, devices.rules)
        self._tell_empty_rows()
        self._demonstrations, self._train_digest = self._open(
            data.train, folder / "dropped_train.jsonl"
        )
        # A row of a step may hold several demonstrations, but none may be left empty by design.
        corpora.require_batch(
            sum(self._demonstrations.lengths),
            options.train.step_rows,
            name=" + ".join(self._demonstrations.names),
            field="config.train.step_rows",
        )
        self._plan = self._planned(self._demonstrations, weights=data.weights, seed=options.seed)
        self._held_out, self._held_out_digest = None, None
        if data.held_out and options.evaluate.every_steps is not None:
            self._held_out, self._held_out_digest = self._open(
                data.held_out, folder / "dropped_held_out.jsonl"
            )

    def num_steps(self, num_epochs: int) -> int:
        """Return the steps of so many epochs."""
        return self._plan.num_steps(num_epochs)

    def train(self, num_steps: int) -> run_lib.OnDevices:
        """Return the batches of the run.

        The load balance of a router is a mean over microbatches, so with it the rows of a
        microbatch are a part of the training: a position is refused where they are others.
        """
        data, train = self._options.data, self._options.train
        has_router = self._model.config.text.moe is not None and train.load_balance > 0
        found = self._demonstrations
        identity = {
            "seed": self._options.seed,
            "sources": [list(part) for part in zip(found.names, found.lengths, strict=True)],
            "rows of config.data.train": self._train_digest,
            # None without evaluation, which may be switched on or off when a run goes on.
            "rows of config.data.held_out": self._held_out_digest,
            "weights": list(data.weights),
            "step_rows": train.step_rows,
            row_shapes.SPLIT: self._num_rows if has_router else None,
            "limits": dataclasses.asdict(self._shapes.limits()),
        }
        make = self._maker(found, self._plan)
        made = steps.Steps(
            make, num_steps=num_steps, identity=identity, num_threads=data.num_threads
        )
        return run_lib.OnDevices(made, self._devices)

    def evaluation(
        self, graphdef: nnx.GraphDef, loss_fn: train_step.LossFn
    ) -> Callable[[Any, int], dict[str, float]] | None:
        """Return what computes the loss on held-out demonstrations; None when there are none."""
        if self._held_out is None:
            return None
        plan = self._planned(self._held_out, weights=(), seed=None)
        num_batches = plan.num_steps(1)
        if self._options.evaluate.num_batches is not None:
            num_batches = min(num_batches, self._options.evaluate.num_batches)
        make = self._maker(self._held_out, plan)

        @jax.jit
        def score(params: nnx.State, batch: batches.SFTBatch) -> reduce.Sum:
            def one(microbatch: batches.SFTBatch) -> reduce.Sum:
                model = nnx.merge(graphdef, params)
                return loss_fn(model, microbatch, jax.random.key(0))[0]["nll"]

            return jax.tree.map(lambda x: x.sum(0), jax.lax.map(one, batch))

        def evaluate(state: Any, step: int) -> dict[str, float]:
            del step
            sums = []
            for number in range(num_batches):
                batch = batches.to_devices(make(number), self._devices.mesh, self._devices.rules)
                sums.append(score(state.params, batch))
            sums = jax.device_get(sums)
            total, weight = (sum(float(s) for s in part) for part in zip(
                *((s.total, s.weight) for s in sums), strict=True
            ))  # fmt: skip
            return {"eval/nll": total / weight, "eval/target_tokens": weight}

        return evaluate

    def _tell_empty_rows(self) -> None:
        """Say so where the devices compute more rows than a step has."""
        rows, computed = self._options.train.step_rows, self._num_microbatches * self._num_rows
        if computed > rows:
            progress.say(
                f"{computed - rows} of {computed} rows of a step stay empty: train.step_rows = "
                f"{rows} does not fill microbatches of {self._num_rows}; another step_rows is "
                "another training"
            )

    def _open(
        self, texts: Sequence[str], dropped: pathlib.Path
    ) -> tuple[demonstrations.Demonstrations, str]:
        """Return the demonstrations of data sets, and the digest of their rows."""
        data = self._options.data
        limits = self._shapes.limits()
        rules = validate.Rules(
            max_bad_rows=data.max_bad_rows,
            option="config.data.max_bad_rows",
            count_tokens=demonstrations.counter(self._words, limits),
            max_tokens=limits.tokens,
            overlong=data.overlong,
            limit_pixels=data.limit_image_pixels,
            num_threads=data.num_threads,
        )
        parts = corpora.open_all(
            texts,
            rules,
            kind="sft",
            image_root=data.image_root,
            cache_dir=data.cache_dir,
            dropped=dropped,
        )
        opened = demonstrations.Demonstrations(
            [(name, one.rows) for name, one in parts],
            self._words,
            cache_bytes=data.cache_mebibytes << 20,
            num_threads=data.num_threads,
            sizes=[size for _, one in parts for size in one.report.counted],
        )
        return opened, corpora.digest([one.report for _, one in parts])

    def _planned(
        self,
        found: demonstrations.Demonstrations,
        *,
        weights: Sequence[float],
        seed: int | None,
    ) -> packing.Plan:
        return packing.Plan(
            found.sizes,
            found.lengths,
            weights,
            limits=self._shapes.limits(),
            step_rows=self._options.train.step_rows,
            num_open_rows=self._options.data.num_open_rows,
            seed=seed,
        )

    def _maker(
        self, found: demonstrations.Demonstrations, plan: packing.Plan
    ) -> Callable[[int], batches.SFTBatch]:
        """Return what makes this process's rows of a step."""
        packed = demonstrations.Packed(
            found,
            plan,
            self._shapes,
            config=self._model.config,
            pixels_dtype=collate.pixels_dtype(self._words),
        )
        num_microbatches = self._num_microbatches
        chosen = [m * self._num_rows + row for m in range(num_microbatches) for row in self._rows]

        def make(step: int) -> batches.SFTBatch:
            text, vision, is_assistant = packed.rows(step, chosen)
            return batches.SFTBatch(
                text=batches.split_text(text, num_microbatches),
                vision=train_step.split_rows(vision, num_microbatches),
                is_assistant=train_step.split_rows(is_assistant, num_microbatches),
            )

        return make
