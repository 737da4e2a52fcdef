"""What alignment and RLVR share: a step's prompts, the policy's responses to them, rows to learn.

A step takes `num_prompts` prompts (`setup.prompt_mixture` says which), draws `num_responses`
responses to each from the policy as it is, and lays all of them into packed rows for one update.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from models import inputs
from prism_jax import configuration, errors, metrics
from prism_jax.data import encode, processor
from prism_jax.policy import responses
from prism_jax.rewards import tags
from prism_jax.rollout import engine, serving
from prism_jax.rollout.sampling import Sampling
from prism_jax.rows import Continuation
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models

Json = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout(configuration.Section):
    """Say what is drawn in a step."""

    num_prompts: int
    num_responses: int  # to each prompt
    # Most that are decoded at a time, over all devices; -1: those to one prompt on each part of the
    # mesh; None: all. Responses do not depend on it.
    batch_responses: int | None = configuration.free()
    max_response_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    # Log-probs, ratios and weights are those of the whole vocabulary. With top_k or top_p below 1,
    # samples are of another distribution, which nothing corrects: refused unless this says so.
    is_cut_allowed: bool
    # Tokens decoded per device call, before the host checks whether all responses have ended.
    chunk_tokens: int = configuration.free()
    # Steps between those whose responses are written to rollouts/; None: never.
    dump_every_steps: int | None = configuration.free()

    def problems(self) -> list[str]:
        """See `Section`."""
        found = configuration.at_least(
            self, 1, "num_prompts", "num_responses", "max_response_tokens", "chunk_tokens",
            "dump_every_steps",
        )  # fmt: skip
        if self.batch_responses not in (None, -1) and self.batch_responses < self.num_responses:
            found.append(
                f"batch_responses must be >= num_responses = {self.num_responses}, -1 or None, got "
                f"{self.batch_responses}"
            )
        if not self.temperature > 0:
            found.append(f"temperature must be > 0 to learn from samples, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k must be >= 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"top_p must be in (0, 1] or None, got {self.top_p}")
        is_cut = self.top_k is not None or (self.top_p is not None and self.top_p < 1)
        if is_cut and not self.is_cut_allowed:
            found.append(
                "top_k must be None and top_p None or 1, because log-probs are of the whole "
                "vocabulary and samples would be of another distribution; is_cut_allowed=True "
                f"takes them all the same, got {self.top_k} and {self.top_p}"
            )
        return found

    def batch_prompts(self, devices: devices_lib.Devices) -> int:
        """Return how many prompts are asked at a time.

        Raises:
          InputError: the responses to them do not divide over the devices.
        """
        if self.batch_responses is None:
            return self.num_prompts
        parts = devices.row_parts()
        if self.batch_responses == -1:
            return min(self.num_prompts, parts)
        if self.batch_responses % (self.num_responses * parts):
            raise errors.InputError(
                f"config.rollout.batch_responses must be a multiple of {self.num_responses} "
                f"responses x {parts} parts of the mesh, -1 or None, got {self.batch_responses}"
            )
        return min(self.num_prompts, self.batch_responses // self.num_responses)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Responses:
    """The responses of a step, those to one prompt side by side."""

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

    def metrics(self) -> metrics.Metrics:
        """Return metrics about the responses."""
        lengths = self.rollout.lengths
        return {
            "rollout/response_tokens_mean": metrics.mean(lengths),
            "rollout/response_tokens_max": metrics.Max(value=np.float32(lengths.max())),
            "rollout/ended_fraction": metrics.mean(self.rollout.ended),
            "rollout/format_fraction": metrics.mean(
                [segments.format_ok for segments in self.segments]
            ),
            "time/generate_seconds": metrics.mean([self.seconds]),
        }


class Sampler:
    """Draw responses from parameters that are passed with every call."""

    def __init__(
        self,
        options: Rollout,
        model: setup_models.Model,
        devices: devices_lib.Devices,
        *,
        words: processor.Processor,
        sizes: Sequence[encode.Size],
        gate: tags.Gate,
    ):
        """Fix the shapes to those of the largest prompts, so that one program is compiled."""
        self._batch_prompts = options.batch_prompts(devices)
        each = -(-self._batch_prompts // devices.row_parts())
        self._options, self._devices = options, devices
        self._graphdef = model.graphdef
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
                row_patches=max(1, each * max(size.patches for size in sizes)),
                row_images=max(1, each * max(size.images for size in sizes)),
            ),
            prefill_implementation=devices.attention,
            decode_implementation=devices.decode_attention,
            chunk_tokens=options.chunk_tokens,
            mesh=devices.mesh,
            rules=devices.rules,
        )

    def __call__(
        self, params: nnx.State, prompts: Sequence[inputs.Example], key: jax.Array
    ) -> Responses:
        """Return the responses to a step's prompts and their segments."""
        return self.prepare(params)(prompts, key)

    def prepare(
        self, params: nnx.State
    ) -> Callable[[Sequence[inputs.Example], jax.Array], Responses]:
        """Return (prompts, key) -> responses of these parameters, laid out for decoding once.

        What is returned holds a copy of the parameters: let go of it before the update.
        """
        graphdef, prepared = serving.prepare(
            self._graphdef, params, dtype=self._devices.dtype, donate=False
        )
        sampler = dataclasses.replace(self._engine, graphdef=graphdef)

        def draw(prompts: Sequence[inputs.Example], key: jax.Array) -> Responses:
            begun = time.monotonic()
            rollout = self._in_batches(functools.partial(sampler.generate, prepared), prompts, key)
            return Responses(
                rollout=rollout,
                segments=self.reader.read(rollout),
                seconds=time.monotonic() - begun,
                num_prompts=len(prompts),
            )

        return draw

    def _in_batches(
        self,
        generate: Callable[..., engine.Rollout],
        prompts: Sequence[inputs.Example],
        key: jax.Array,
    ) -> engine.Rollout:
        """Ask the engine for as many prompts at a time as memory takes; the last are filled up."""
        size, each = self._batch_prompts, self._options.num_responses
        found = []
        for first in range(0, len(prompts), size):
            batch = prompts[first : first + size]
            filled = [*batch, *[batch[-1]] * (size - len(batch))]
            rollout = generate(filled, self._sampling, key, num_responses=each, first_prompt=first)
            found.append(vars(rollout))
        wanted = len(prompts) * each
        return engine.Rollout(
            **{name: np.concatenate([one[name] for one in found])[:wanted] for name in found[0]}
        )
