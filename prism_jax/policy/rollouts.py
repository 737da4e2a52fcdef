"""The policy's responses to a step's prompts, in alignment and RLVR.

A step takes `num_prompts` prompts, see `setup.prompt_mixture`, and the policy as it is responds
`num_responses` times to each.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models import inputs, lora
from prism_jax import configuration, errors, metrics
from prism_jax.data import encode, processor
from prism_jax.policy import responses
from prism_jax.rewards import tags
from prism_jax.rollout import engine, layout, serving
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
    # Most that are decoded at a time, over all devices; None: as many as memory holds.
    batch_responses: int | None = configuration.free()
    # Devices that share a copy of the weights; None: as few as memory allows.
    tensor: int | None = configuration.free()
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
            "batch_responses", "tensor", "dump_every_steps",
        )  # fmt: skip
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


def open_engine(
    options: Rollout,
    model: setup_models.Model,
    devices: devices_lib.Devices,
    sizes: Sequence[encode.Size],
) -> engine.Engine:
    """Return the engine for prompts of these sizes; graph and mesh are those of the rollouts.

    Raises:
      InputError: a copy of the weights cannot be cut as configured.
    """
    heads, num_devices = model.config.text.num_kv_heads, devices.mesh.size
    if options.tensor is not None and (heads % options.tensor or num_devices % options.tensor):
        raise errors.InputError(
            f"config.rollout.tensor must divide {heads} kv heads and {num_devices} devices, "
            f"got {options.tensor}"
        )
    return engine.Engine(
        graphdef=model.graphdef,
        config=model.config,
        # Those of the largest prompts, so that one program serves every step.
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
        say=setup_models.say_once(),
    )


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
        self._options, self._devices = options, devices
        self._graphdef = model.graphdef
        self._mesh: Mesh | None = None  # chosen when the training state is in memory
        self._sampling = options.sampling(ends=words.ids.ends)
        self.reader = responses.Reader.of(
            words, vocab_tokens=model.config.text.vocab_size, gate=gate
        )
        self._engine = open_engine(options, model, devices, sizes)

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
        graphdef, params = lora.merged(self._graphdef, params)
        if self._mesh is None:
            self._mesh = self._choose_mesh(params)
        graphdef, prepared = serving.prepare(
            graphdef,
            params,
            dtype=self._devices.dtype,
            donate=False,
            mesh=self._mesh,
            rules=self._devices.rules,
        )
        sampler = dataclasses.replace(self._engine, graphdef=graphdef, mesh=self._mesh)

        def respond(prompts: Sequence[inputs.Example], key: jax.Array) -> Responses:
            begun = time.monotonic()
            rollout = sampler.generate(
                prepared,
                prompts,
                self._sampling,
                key,
                num_responses=self._options.num_responses,
            )
            return Responses(
                rollout=rollout,
                segments=self.reader.read(rollout),
                seconds=time.monotonic() - begun,
                num_prompts=len(prompts),
            )

        return respond

    def _choose_mesh(self, params: nnx.State) -> Mesh:
        """Return the mesh of rollouts, with the memory that the training state leaves."""
        tensor, devices = self._options.tensor, self._devices
        if tensor is None:
            tensor = layout.choose_tensor(
                params, self._engine.config, devices=devices.mesh, dtype=devices.dtype
            )
        return layout.mesh(devices.mesh, tensor=tensor)
