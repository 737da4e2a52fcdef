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
from prism_jax.setup import agreement, corpora, row_shapes
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.sft import config as sft_config
from prism_jax.training import train_step


class Feed:
    """The packed batches of the stage, to train on and to evaluate on."""

    def __init__(
        self,
        options: sft_config.Config,
        devices: devices_lib.Devices,
        model: setup_models.Model,
        *,
        files: pathlib.Path,
        folder: pathlib.Path,
    ):
        """Open, validate and measure the demonstrations.

        Args:
          files: small files of the model.
          folder: gets the lists of the rows that are left out.

        Raises:
          InputError: for wrong data, fewer demonstrations than rows in a step, or rows that do
            not divide over the devices.
        """
        data = options.data
        self._options, self._devices, self._model = options, devices, model
        self._words = processor.Processor.from_folder(
            files, min_pixels=data.min_pixels, max_pixels=data.max_pixels, place="config.data."
        )
        self._shapes = collate.Shapes(
            row_tokens=data.row_tokens,
            row_examples=data.row_examples,
            row_patches=data.row_patches,
            row_images=data.row_images,
        )
        # Before the data are read, which may take minutes: a row of tokens and the row of its
        # images must lie on the same devices.
        if devices.rules.mesh_axes("images") != devices.rules.mesh_axes("batch"):
            raise errors.InputError("config.mesh.rules: images must lie as batch does")
        self._num_microbatches, self._num_rows = options.microbatches(devices.layout())
        self._rows = devices.local_rows(self._num_rows)
        self._say_empty_rows()
        self._demonstrations, self._train_digest = self._open(
            data.train, folder / "dropped_train.jsonl"
        )
        # A row may hold several demonstrations, but every row must get at least one.
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
        """Return the number of steps of `num_epochs`."""
        return self._plan.num_steps(num_epochs)

    def train(self, num_steps: int, *, inputs: agreement.Inputs) -> run_lib.OnDevices:
        """Return the batches of the run; which rows a step is made of is noted in `inputs`.

        The load balance of a router is a mean over microbatches, so with it the rows of a
        microbatch are a part of the training: a position with other rows is refused.
        """
        data, train = self._options.data, self._options.train
        opened = self._demonstrations
        has_router = self._model.config.text.moe is not None and train.load_balance > 0
        # What decides the rows of a step: a resumed run with any other is refused.
        identity = {
            "seed": self._options.seed,
            "sources": [list(part) for part in zip(opened.names, opened.lengths, strict=True)],
            "rows of config.data.train": self._train_digest,
            # None without evaluation, which may be switched on or off in a resumed run.
            "rows of config.data.held_out": self._held_out_digest,
            "weights": list(data.weights),
            "step_rows": train.step_rows,
            row_shapes.SPLIT: self._num_rows if has_router else None,
            "limits": dataclasses.asdict(self._shapes.limits()),
            "packing": packing.RULE,
        }
        make = self._maker(opened, self._plan)
        agreement.require_same("rows and settings of config.data", identity)

        def noted(step: int) -> batches.SFTBatch:
            rows = self._plan.step(step)
            sizes = opened.sizes[[number for row in rows for number in row]]
            inputs.note(step, [list(row) for row in rows], sizes)
            return make(step)

        made = steps.Steps(
            noted, num_steps=num_steps, identity=identity, num_threads=data.num_threads
        )
        return run_lib.OnDevices(made, self._devices, num_rows=self._num_rows)

    def evaluation(
        self, graphdef: nnx.GraphDef, loss_fn: train_step.LossFn
    ) -> Callable[[Any, int], dict[str, float]] | None:
        """Return the evaluation of the loss on held-out demonstrations; None without any."""
        if self._held_out is None:
            return None
        # Without a seed: held-out rows stay in the order of their files, the same in every run.
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
                batch = self._devices.put(make(number), num_rows=self._num_rows)
                sums.append(score(state.params, batch))
            # All batches are dispatched before the first sum is read. Sums are added in float64,
            # since a float32 total of many batches would round.
            sums = jax.device_get(sums)
            total, weight = (sum(float(s) for s in part) for part in zip(
                *((s.total, s.weight) for s in sums), strict=True
            ))  # fmt: skip
            return {"eval/nll": total / weight, "eval/target_tokens": weight}

        return evaluate

    def _say_empty_rows(self) -> None:
        """Say where the devices compute more rows than a step has."""
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
            [(name, part.rows) for name, part in parts],
            self._words,
            cache_bytes=data.cache_mebibytes << 20,
            num_threads=data.num_threads,
            sizes=[size for _, part in parts for size in part.report.counted],
        )
        return opened, corpora.digest([part.report for _, part in parts])

    def _planned(
        self,
        opened: demonstrations.Demonstrations,
        *,
        weights: Sequence[float],
        seed: int | None,
    ) -> packing.Plan:
        return packing.Plan(
            opened.sizes,
            opened.lengths,
            weights,
            limits=self._shapes.limits(),
            step_rows=self._options.train.step_rows,
            num_open_rows=self._options.data.num_open_rows,
            seed=seed,
        )

    def _maker(
        self, opened: demonstrations.Demonstrations, plan: packing.Plan
    ) -> Callable[[int], batches.SFTBatch]:
        """Return (step) -> this process's rows of the step, in microbatches."""
        packed = demonstrations.Packed(
            opened,
            plan,
            self._shapes,
            config=self._model.config,
            pixels_dtype=collate.pixels_dtype(self._words),
        )
        num_microbatches = self._num_microbatches
        # Of each microbatch this process makes the rows that its devices hold, and no others.
        local_rows = [
            m * self._num_rows + row for m in range(num_microbatches) for row in self._rows
        ]

        def make(step: int) -> batches.SFTBatch:
            text, vision, is_assistant = packed.rows(step, local_rows)
            rows = batches.SFTBatch(text=text, vision=vision, is_assistant=is_assistant)
            return batches.split(rows, num_microbatches)

        return make
