"""The sampler: prompts in, responses out. Parameters are passed with every call, never kept."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from models import attention, decode_attention, sharding
from models.config import Qwen3VLConfig
from models.inputs import Example
from prism_jax.rollout import memory, prefill
from prism_jax.rollout.device import Device
from prism_jax.rollout.sampling import Sampling
from prism_jax.rollout.session import Look, Session, Stream
from prism_jax.rollout.slots import Ticket

# Places that the kernels of decoding read multiples of.
_MULTIPLES = {"xla": 1, "cudnn": 64, "pallas": 128}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """The responses on the host; those of one prompt side by side."""

    tokens: np.ndarray  # int32[responses, max_tokens]  0 behind the response
    logprobs: np.ndarray  # float32[responses, max_tokens]  of each token when it was drawn
    lengths: np.ndarray  # int32[responses]  tokens of the response, its end token included
    ended: np.ndarray  # bool[responses]  False where the limit cut the response

    def is_finite(self) -> bool:
        """Return whether every token came from finite logits; others mean nothing."""
        return bool(np.isfinite(self.logprobs).all())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of one prompt are rounded up to multiples of these, so that few shapes are compiled.

    Give the largest sizes that can come to compile the same shapes for every call. Attention
    kernels round further.
    """

    prompt_tokens: int
    prompt_patches: int
    prompt_images: int  # one frame of a video counting as one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """A sampler of a model whose layers were laid out by `serving.prepare`.

    Args:
      prefill_implementation, decode_implementation: see `models.attention`, `decode_attention`.
      chunk_tokens: tokens decoded between two looks of the host.
      num_slots: most responses in flight, over all devices; None: as many as memory holds.
      mesh, rules: slots are spread over the mesh axes of the logical axis "batch"; None without.
      say: gets the line about the slots.
      plans: of earlier sessions, see `Session`.
    """

    graphdef: nnx.GraphDef
    config: Qwen3VLConfig
    shapes: Shapes
    prefill_implementation: attention.Implementation
    decode_implementation: decode_attention.Implementation
    chunk_tokens: int
    num_slots: int | None
    mesh: Mesh | AbstractMesh | None  # abstract: nothing is run, see `commands.plan`
    rules: sharding.Rules
    say: Callable[[str], None]
    plans: dict = dataclasses.field(default_factory=dict, repr=False)

    def generate(
        self,
        params: nnx.State,
        prompts: Sequence[Example],
        sampling: Sampling,
        key: jax.Array,
        *,
        num_responses: int,
        first_prompt: int = 0,
        limits: Sequence[int] | None = None,
        on_chunk: Callable[[Look], None] | None = None,
        on_finished: Callable[[int, list[Ticket]], None] | None = None,
    ) -> Rollout:
        """Draw `num_responses` responses to each prompt.

        Args:
          key: the same key gives a prompt at the same place among the prompts the same responses,
            whatever the other prompts are.
          first_prompt: the place of the first of these prompts among all that the key is for: drawn
            in parts, prompts get the responses that they get together.
          limits: most tokens of each response, at most `sampling.max_tokens`; None: that.
          on_chunk: is called after each chunk, while the device decodes the next.
          on_finished: is called with the number of a prompt and the responses to it when all are
            done, while the device decodes others.
        """
        if not prompts or num_responses < 1:
            raise ValueError(
                f"generate needs prompts and responses, got {len(prompts)}, {num_responses}"
            )
        count = len(prompts) * num_responses
        if limits is None:
            limits = [sampling.max_tokens] * count
        if len(limits) != count or not 1 <= min(limits) <= max(limits) <= sampling.max_tokens:
            raise ValueError(
                f"limits must be {count} numbers between 1 and max_tokens = {sampling.max_tokens}"
            )
        largest = np.max([prefill.measure(prompt) for prompt in prompts], axis=0)
        work = self.work(
            num_prompts=len(prompts),
            num_responses=num_responses,
            largest=tuple(int(size) for size in largest),
            max_tokens=sampling.max_tokens,
        )
        each = work.group_responses
        session = self.open(
            params,
            work,
            num_ends=len(sampling.end_token_ids),
            key_impl=str(jax.random.key_impl(key)),
            on_look=on_chunk,
        )
        streams: list[Stream] = []
        for number, prompt in enumerate(prompts):
            for first in range(0, num_responses, each):
                copies = range(first, min(first + each, num_responses))
                places = [number * num_responses + copy for copy in copies]
                streams += session.submit(
                    prompt,
                    [dataclasses.replace(sampling, max_tokens=int(limits[n])) for n in places],
                    key,
                    numbers=[first_prompt * num_responses + n for n in places],
                )
        tickets = [stream.ticket for stream in streams]
        _run(session, tickets, num_responses, on_finished)
        session.close()
        return _rollout(tickets, sampling.max_tokens)

    def open(
        self,
        params: nnx.State,
        work: memory.Work,
        *,
        num_ends: int,
        key_impl: str,
        on_look: Callable[[Look], None] | None = None,
        least_prefill_tokens: int | None = None,
    ) -> Session:
        """Return a session with as many slots as the work needs and memory holds.

        Args:
          num_ends: most end tokens of a request.
          key_impl: of all keys, as `jax.random.key_impl` names it.
          least_prefill_tokens: compile programs for small prompts too, see `prefill.levels`; None:
            each prompt takes as long to read as the largest.
        """
        if nnx.merge(self.graphdef, params).rules != self.rules:
            raise ValueError("the engine's rules must be those that its model was made with")
        embedding = params["text"]["embed"]["embedding"]
        device = Device(
            graphdef=self.graphdef,
            config=self.config,
            prefill_implementation=self.prefill_implementation,
            decode_implementation=self.decode_implementation,
            chunk_tokens=self.chunk_tokens,
            dtype=embedding.dtype,
            mesh=self.mesh,
            rules=self.rules,
        )
        shape = prefill.shape(
            tokens=work.prompt_tokens,
            patches=work.prompt_patches,
            frames=work.prompt_images,
            implementation=self.prefill_implementation,
        )
        devices = jax.devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)
        limits = self.limits(free_bytes=memory.free_bytes(devices), dtype=embedding.dtype)
        return Session(
            device,
            params,
            work=work,
            limits=limits,
            shape=shape,
            least_prefill_tokens=least_prefill_tokens,
            plans=self.plans,
            num_ends=num_ends,
            key_impl=key_impl,
            say=self.say,
            on_look=on_look,
        )

    def limits(self, *, free_bytes: int | None, dtype: Any) -> memory.Limits:
        """Return the bounds of the slots.

        Args:
          free_bytes: of each device; None: unknown.
          dtype: of keys and values.
        """
        cuts, heads = self._size("act_kv_heads"), self.config.text.num_kv_heads
        if heads % cuts:
            raise ValueError(f"the sampler's mesh cuts {heads} kv heads over {cuts} devices")
        return memory.Limits(
            num_parts=self.num_parts(),
            num_cuts=cuts,
            free_bytes=free_bytes,
            num_slots=self.num_slots,
            multiple=_MULTIPLES[self.decode_implementation],
            dtype=dtype,
        )

    def num_parts(self) -> int:
        """Return the number of parts of the mesh over which slots are spread."""
        return self._size("batch")

    def _size(self, axis: str) -> int:
        """Return the number of devices over which a logical axis is cut."""
        if self.mesh is None:
            return 1
        return math.prod(self.mesh.shape[name] for name in self.rules.mesh_axes(axis))

    def work(
        self,
        *,
        num_prompts: int,
        num_responses: int,
        largest: tuple[int, int, int],
        max_tokens: int,
    ) -> memory.Work:
        """Return the work of a rollout for a number of prompts.

        Args:
          num_responses: to each prompt.
          largest: tokens, patches and images of the largest prompts.
          max_tokens: of the longest response.
        """
        # Parts of a mesh that would get no prompt share the responses to one.
        count = num_prompts * num_responses
        each = min(num_responses, math.ceil(count / self.num_parts()))
        shapes = self.shapes
        return memory.Work(
            num_groups=num_prompts * math.ceil(num_responses / each),
            num_responses=count,
            group_responses=each,
            prompt_tokens=memory.round_up(largest[0], shapes.prompt_tokens),
            prompt_patches=memory.round_up(largest[1], shapes.prompt_patches),
            prompt_images=memory.round_up(largest[2], shapes.prompt_images),
            response_tokens=max_tokens,
        )


def _run(
    session: Session,
    tickets: Sequence[Ticket],
    num_responses: int,
    on_finished: Callable[[int, list[Ticket]], None] | None,
) -> None:
    """Drive the session until all responses are done; report each prompt as it is done."""
    prompt_of = {id(ticket): place // num_responses for place, ticket in enumerate(tickets)}
    left = [num_responses] * (len(tickets) // num_responses)
    while any(left):
        for ticket in session.look():
            number = prompt_of[id(ticket)]
            left[number] -= 1
            if left[number] == 0 and on_finished is not None:
                first = number * num_responses
                on_finished(number, list(tickets[first : first + num_responses]))


def _rollout(tickets: Sequence[Ticket], max_tokens: int) -> Rollout:
    tokens = np.zeros((len(tickets), max_tokens), np.int32)
    logprobs = np.zeros((len(tickets), max_tokens), np.float32)
    for row, ticket in enumerate(tickets):
        tokens[row, : len(ticket.tokens)] = ticket.tokens
        logprobs[row, : len(ticket.tokens)] = ticket.logprobs
    return Rollout(
        tokens=tokens,
        logprobs=logprobs,
        lengths=np.array([len(ticket.tokens) for ticket in tickets], np.int32),
        ended=np.array([ticket.is_ended for ticket in tickets]),
    )
