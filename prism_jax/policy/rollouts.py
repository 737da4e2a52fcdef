"""The policy's responses to a step's prompts, in alignment and RLVR.

A step takes `num_prompts` prompts, see `setup.prompt_mixture`, and the policy as it is responds
`num_responses` times to each.
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
    """The responses of a step, and how they are sampled."""

    num_prompts: int
    num_responses: int  # to each prompt
    # Most responses that are decoded at a time, over all devices; None: all.
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
        problems = configuration.at_least(
            self, 1, "num_prompts", "num_responses", "max_response_tokens", "chunk_tokens",
            "dump_every_steps",
        )  # fmt: skip
        if self.batch_responses is not None and self.batch_responses < self.num_responses:
            problems.append(
                f"batch_responses must be >= num_responses = {self.num_responses} or None, got "
                f"{self.batch_responses}"
            )
        if not self.temperature > 0:
            problems.append(
                f"temperature must be > 0 to learn from samples, got {self.temperature}"
            )
        problems += self._cut_problems()
        return problems

    def _cut_problems(self) -> list[str]:
        """Return the problems of `top_k` and `top_p`; their bounds are the sampler's."""
        problems = []
        try:
            Sampling(
                temperature=1.0,
                top_k=self.top_k,
                top_p=self.top_p,
                max_tokens=1,
                end_token_ids=(),
            )
        except ValueError as error:
            problems.append(str(error).removeprefix("sampling."))
        is_cut = self.top_k is not None or (self.top_p is not None and self.top_p < 1)
        if is_cut and not self.is_cut_allowed:
            problems.append(
                "top_k must be None and top_p None or 1, because log-probs are of the whole "
                "vocabulary and samples would be of another distribution; is_cut_allowed=True "
                f"takes them all the same, got {self.top_k} and {self.top_p}"
            )
        return problems

    def sampling(self, *, ends: tuple[int, ...]) -> Sampling:
        """Return the sampler's settings."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_tokens=self.max_response_tokens,
            end_token_ids=ends,
        )

    def batch_prompts(self, devices: devices_lib.Devices) -> int:
        """Return the number of prompts whose responses are decoded at a time.

        Raises:
          InputError: the responses to them do not divide over the devices.
        """
        if self.batch_responses is None:
            return self.num_prompts
        parts = devices.row_parts()
        if self.batch_responses % (self.num_responses * parts):
            raise errors.InputError(
                f"config.rollout.batch_responses must be a multiple of {self.num_responses} "
                f"responses x {parts} parts of the mesh, or None, got {self.batch_responses}"
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
        """Return the responses behind their prompts, each with the sampler's tokens."""
        num_responses = len(self.segments) // self.num_prompts
        tokens = self.rollout.tokens
        return [
            Continuation(prompt=number // num_responses, tokens=tokens[number, :length])
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
    """The sampler of responses; parameters are passed with every call."""

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
        """Store the parts; nothing is compiled before the first step."""
        self._batch_prompts = options.batch_prompts(devices)
        # Prompts of a vision row, rounded up: each part of the mesh has a row of its own.
        part_prompts = -(-self._batch_prompts // devices.row_parts())
        self._options, self._devices = options, devices
        self._graphdef = model.graphdef
        self._sampling = options.sampling(ends=words.ids.ends)
        self.reader = responses.Reader.of(
            words, vocab_tokens=model.config.text.vocab_size, gate=gate
        )
        self._engine = engine.Engine(
            graphdef=model.graphdef,
            config=model.config,
            # Those of the largest prompts, so that one program serves every step.
            shapes=engine.Shapes(
                prompt_tokens=max(size.tokens for size in sizes),
                row_patches=max(1, part_prompts * max(size.patches for size in sizes)),
                row_images=max(1, part_prompts * max(size.images for size in sizes)),
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

        The function holds a copy of the parameters: drop it before the update.
        """
        graphdef, prepared = serving.prepare(
            self._graphdef, params, dtype=self._devices.dtype, donate=False
        )
        sampler = dataclasses.replace(self._engine, graphdef=graphdef)

        def respond(prompts: Sequence[inputs.Example], key: jax.Array) -> Responses:
            begun = time.monotonic()
            rollout = self._in_batches(functools.partial(sampler.generate, prepared), prompts, key)
            return Responses(
                rollout=rollout,
                segments=self.reader.read(rollout),
                seconds=time.monotonic() - begun,
                num_prompts=len(prompts),
            )

        return respond

    def _in_batches(
        self,
        generate: Callable[..., engine.Rollout],
        prompts: Sequence[inputs.Example],
        key: jax.Array,
    ) -> engine.Rollout:
        """Return the responses to all prompts, decoded `batch_prompts` at a time."""
        size, num_responses = self._batch_prompts, self._options.num_responses
        rollouts = []
        for first in range(0, len(prompts), size):
            batch = prompts[first : first + size]
            # The last batch is filled up with its last prompt: another size would be another
            # program.
            filled = [*batch, *[batch[-1]] * (size - len(batch))]
            rollouts.append(
                generate(
                    filled,
                    self._sampling,
                    key,
                    num_responses=num_responses,
                    first_prompt=first,
                )
            )
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *map(vars, rollouts))
        size = len(prompts) * num_responses
        return engine.Rollout(**{name: array[:size] for name, array in joined.items()})
