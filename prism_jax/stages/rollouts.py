"""What alignment and RLVR share: a step's prompts, the policy's responses to them, rows to learn.

A step takes `num_prompts` prompts (`prompt_mixture` says which), draws `num_responses`
responses to each from the policy as it is, and lays all of them into packed rows for one update.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models import inputs
from prism_jax import (
    configuration,
    continuations,
    errors,
    metric_writers,
    metrics,
)
from prism_jax.continuations import Continuation, Largest, RowShape
from prism_jax.data import encode, processor, records
from prism_jax.rewards import tags
from prism_jax.rollout import engine, layout, serving
from prism_jax.rollout.sampling import Sampling
from prism_jax.stages import responses, setup

Json = Any
_FOLDER = "rollouts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout(configuration.Section):
    """Say what is drawn in a step."""

    num_prompts: int
    num_responses: int  # to each prompt
    # Most that are decoded at a time, over all devices; None: as many as memory holds.
    batch_responses: int | None
    tensor: int | None  # devices that share a copy of the weights; None: as few as memory allows
    max_response_tokens: int
    temperature: float
    # Log-probs are of the whole vocabulary: with a cut, ratios and mismatch do not see it.
    top_k: int | None
    top_p: float | None
    chunk_tokens: int  # decoded between two looks of the host
    dump_every_steps: int | None  # how often responses are written to rollouts/; None: never

    def problems(self) -> list[str]:
        """See `Section`."""
        found = configuration.at_least(
            self, 1, "num_prompts", "num_responses", "max_response_tokens", "chunk_tokens",
            "batch_responses", "tensor", "dump_every_steps",
        )  # fmt: skip
        if not self.temperature > 0:
            found.append(f"temperature must be > 0 to learn from samples, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k must be >= 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"top_p must be in (0, 1] or None, got {self.top_p}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows(configuration.Section):
    """Say into which packed rows sequences are laid; how many follows from the largest batch."""

    row_tokens: int
    row_sequences: int  # most sequences in a row
    num_rows: int  # of a microbatch, over all devices

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 1, "row_tokens", "row_sequences", "num_rows")

    def shape(self, largest: Largest, devices: setup.Devices, *, place: str) -> RowShape:
        """Return the static shapes of a batch.

        Raises:
          InputError: the rows are too short, or do not divide over the devices.
        """
        is_splash = devices.attention == "splash"
        if self.num_rows % devices.row_parts() or (is_splash and self.row_tokens % 128):
            raise errors.InputError(
                f"{place}.num_rows must divide over {devices.row_parts()} parts of the mesh, and "
                f"row_tokens by 128 for splash attention, got {self.num_rows}, {self.row_tokens}"
            )
        return continuations.row_shape(
            largest,
            row_tokens=self.row_tokens,
            row_sequences=self.row_sequences,
            microbatch_rows=self.num_rows,
            patch_multiple=128 if is_splash else 1,
            place=place,
        )


def processor_of(
    files: pathlib.Path, *, min_pixels: int | None, max_pixels: int | None
) -> processor.Processor:
    """Return the processor of a model's folder, with other bounds on pictures where given."""
    words = processor.Processor.from_folder(files)
    changes = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    settings = dataclasses.replace(
        words.image_settings,
        **{name: value for name, value in changes.items() if value is not None},
    )
    if settings.min_pixels > settings.max_pixels:
        raise errors.InputError(
            f"min_pixels must be <= max_pixels, got {settings.min_pixels} and "
            f"{settings.max_pixels} with those of {files}"
        )
    return dataclasses.replace(words, image_settings=settings)


def encode_prompts(
    rows: Sequence[records.PromptRow], words: processor.Processor
) -> list[inputs.Example]:
    """Return the prompts of rows as the sampler reads them."""
    return [
        encode.example(row.prompt, row.images, words, add_generation_prompt=True) for row in rows
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """Hold the responses of a step, those to one prompt side by side."""

    rollout: engine.Rollout
    segments: list[tags.Segments]
    num_prompts: int
    seconds: float

    def continuations(self) -> list[Continuation]:
        """Return the responses behind their prompts, each with the tokens that were drawn."""
        each = len(self.segments) // self.num_prompts
        return [
            Continuation(prompt=number // each, tokens=self.rollout.tokens[number, :length])
            for number, length in enumerate(self.rollout.lengths)
        ]

    def told(self) -> metrics.Metrics:
        """Return what a user watches of the responses themselves."""
        lengths = self.rollout.lengths
        return {
            "rollout/response_tokens_mean": mean(lengths),
            "rollout/response_tokens_max": metrics.Max(value=np.float32(lengths.max())),
            "rollout/ended_fraction": mean(self.rollout.ended),
            "rollout/format_fraction": mean([one.format_ok for one in self.segments]),
            "time/generate_seconds": mean([self.seconds]),
        }


def mean(values: Sequence[float] | np.ndarray) -> metrics.Mean:
    """Return the mean of values on the host; of no value it does not exist."""
    values = np.asarray(values, np.float32)
    return metrics.Mean(total=np.float32(values.sum()), weight=np.float32(values.size))


class Sampler:
    """Draw responses from parameters that are passed with every call."""

    def __init__(
        self,
        options: Rollout,
        model: setup.Model,
        devices: setup.Devices,
        *,
        words: processor.Processor,
        sizes: Sequence[encode.Size],
        gate: tags.Gate,
    ):
        """Fix the shapes to those of the largest prompts, so that one program is compiled."""
        heads, num_devices = model.config.text.num_kv_heads, devices.mesh.size
        if options.tensor is not None and (heads % options.tensor or num_devices % options.tensor):
            raise errors.InputError(
                f"config.rollout.tensor must divide {heads} kv heads and {num_devices} devices, "
                f"got {options.tensor}"
            )
        self._options, self._devices = options, devices
        self._graphdef = model.graphdef
        self._mesh: Mesh | None = None  # chosen when the training state is in memory
        self._sampling = Sampling(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            max_tokens=options.max_response_tokens,
            end_token_ids=words.ids.ends,
        )
        self.reader = responses.Reader.of(
            words, vocab_tokens=model.config.text.vocab_size, gate=gate
        )
        self._engine = engine.Engine(
            graphdef=model.graphdef,
            config=model.config,
            shapes=engine.Shapes(
                prompt_tokens=max(size.tokens for size in sizes),
                prompt_patches=max(1, *(size.patches for size in sizes)),
                prompt_images=max(1, *(size.images for size in sizes)),
            ),
            prefill_implementation=devices.attention,
            decode_implementation=devices.decode_attention,
            chunk_tokens=options.chunk_tokens,
            num_slots=options.batch_responses,
            mesh=None,
            rules=devices.rules,
            say=setup.say_once(),
        )

    def __call__(
        self, params: nnx.State, prompts: Sequence[inputs.Example], key: jax.Array
    ) -> Drawn:
        """Return the responses to a step's prompts and their segments."""
        return self.prepare(params)(prompts, key)

    def prepare(self, params: nnx.State) -> Callable[[Sequence[inputs.Example], jax.Array], Drawn]:
        """Return (prompts, key) -> responses of these parameters, laid out for decoding once.

        What is returned holds a copy of the parameters: let go of it before the update.
        """
        if self._mesh is None:
            self._mesh = self._choose_mesh(params)
        graphdef, prepared = serving.prepare(
            self._graphdef,
            params,
            dtype=self._devices.dtype,
            donate=False,
            mesh=self._mesh,
            rules=self._devices.rules,
        )
        sampler = dataclasses.replace(self._engine, graphdef=graphdef, mesh=self._mesh)

        def draw(prompts: Sequence[inputs.Example], key: jax.Array) -> Drawn:
            begun = time.monotonic()
            rollout = sampler.generate(
                prepared,
                prompts,
                self._sampling,
                key,
                num_responses=self._options.num_responses,
            )
            return Drawn(
                rollout=rollout,
                segments=self.reader.read(rollout),
                seconds=time.monotonic() - begun,
                num_prompts=len(prompts),
            )

        return draw

    def _choose_mesh(self, params: nnx.State) -> Mesh:
        """Return the mesh of rollouts, with the memory that the training state leaves."""
        tensor, devices = self._options.tensor, self._devices
        if tensor is None:
            tensor = layout.choose_tensor(
                params, self._engine.config, devices=devices.mesh, dtype=devices.dtype
            )
        return layout.mesh(devices.mesh, tensor=tensor)


class Dump:
    """Write a step's responses to `rollouts/<step>.jsonl`, one line each."""

    def __init__(self, workdir: pathlib.Path, every_steps: int | None):
        self._folder = workdir / _FOLDER
        self._every_steps = every_steps

    def write(
        self,
        step: int,
        rows: Sequence[records.PromptRow],
        drawn: Drawn,
        values: Mapping[str, Sequence[Json]],
    ) -> None:
        """Write the responses that the step of this number learns from, where one is due.

        Args:
          values: further fields, one value a response.
        """
        self.write_segments(step, rows, drawn.segments, values)

    def write_segments(
        self,
        step: int,
        rows: Sequence[records.PromptRow],
        segments: Sequence[tags.Segments],
        values: Mapping[str, Sequence[Json]],
    ) -> None:
        """Write responses as `write` does, from their segments."""
        is_due = self._every_steps is not None and step % self._every_steps == 0
        if not is_due or jax.process_index() != 0:
            return
        each = len(segments) // max(1, len(rows))
        lines = []
        for number, one in enumerate(segments):
            row = rows[number // each]
            line = {
                "step": step,
                "id": row.id,
                "response": number % each,
                "ground_truth": row.ground_truth,
                "text": one.text,
                "caption": one.caption,
                "cot": one.cot,
                "format_ok": one.format_ok,
                "ended": one.ended,
                "response_tokens": one.response_tokens,
            }
            lines.append(line | {name: _plain(column[number]) for name, column in values.items()})
        metric_writers.write_dump(self._folder, step, lines)


def _plain(value: Any) -> Json:
    """Return numbers of NumPy as JSON values."""
    return value.item() if isinstance(value, np.generic) else value


def require_one_process(stage: str) -> None:
    """Raise InputError in a job of several processes, which the sampler does not serve yet."""
    if jax.process_count() > 1:
        raise errors.InputError(f"{stage} runs in one process, got {jax.process_count()}")
