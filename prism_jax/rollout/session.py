"""Requests in, tokens out as they come: the host's loop around the device's slots.

A look reads the last chunk, fills the slots, sends the next chunk to the device and only
then hands out tokens, so that whoever receives them works while the device decodes.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from models.inputs import Example
from prism_jax.rollout import decode, memory, prefill
from prism_jax.rollout.device import Device
from prism_jax.rollout.sampling import Mode, Sampling, Settings
from prism_jax.rollout.slots import Group, Slots, Ticket

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
# Reading prompts begins with reading the weights, which takes about as long as so many tokens.
_CALL_TOKENS = 256

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """The host's view of a chunk."""

    num_steps: int
    tokens: np.ndarray  # int32[slots]  of the response behind the chunk, 0 in an empty slot
    new_tokens: np.ndarray  # int32[slots]
    prompt_tokens: int  # of the prompts that some slot reads, each counted once
    reader_tokens: int  # the same, counted for each slot that reads it
    prefill_tokens: int  # of prompts read before the chunk
    num_finished: int  # responses in the session so far
    num_left: int  # responses that are not finished


class Stream:
    """The tokens of one response as they come, each with its log-probability."""

    def __init__(self, session: "Session", ticket: Ticket):
        self._session, self.ticket = session, ticket

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """Yield tokens until the response is done; drives the session where no thread does."""
        number, ticket = 0, self.ticket
        while True:
            self._session.wait_for(lambda n=number: ticket.is_done or len(ticket.tokens) > n)
            while number < len(ticket.tokens):
                yield ticket.tokens[number], ticket.logprobs[number]
                number += 1
            if ticket.is_done:
                return

    def wait(self) -> Ticket:
        """Return the finished response."""
        self._session.wait_for(lambda: self.ticket.is_done)
        return self.ticket

    def cancel(self) -> None:
        """End the response where it is, with the next look."""
        self._session.cancel(self.ticket)


class Session:
    """A running sampler with its parameters; other threads may submit and cancel.

    Args:
      plans: of sessions so far: one of the same sizes gets the same, and so the same programs,
        however little the free memory has changed.
      least_prefill_tokens: see `prefill.levels`.
      num_ends: most end tokens of a request.
      key_impl: of all keys, as `jax.random.key_impl` names it.
    """

    def __init__(
        self,
        device: Device,
        params: nnx.State,
        *,
        work: memory.Work,
        limits: memory.Limits,
        shape: prefill.Shape,
        least_prefill_tokens: int | None,
        plans: dict,
        num_ends: int,
        key_impl: str,
        say: Callable[[str], None],
        on_look: Callable[[Look], None] | None,
    ):
        self._device, self._params = device, params
        self._work, self._limits, self._shape = work, limits, shape
        self._num_ends, self._key_impl, self._say = max(1, num_ends), key_impl, say
        self._on_look, self._least_prefill_tokens = on_look, least_prefill_tokens
        self._queue: collections.deque[Group] = collections.deque()
        self._cancelled: list[Ticket] = []
        self._finished: list[Ticket] = []  # and not yet handed out
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_closed = False
        self._num_finished = self._num_left = 0
        # Without the free memory of the moment, which says nothing about the requested sizes.
        self._plans, self._sizes = plans, (work, dataclasses.replace(limits, free_bytes=None))
        if self._sizes not in plans:
            plans[self._sizes] = memory.make(device.config, work, limits)
        self._open(plans[self._sizes])

    def _open(self, plan: memory.Plan) -> None:
        self.plan, self._slots = plan, Slots(plan)
        self.levels = prefill.levels(
            self._shape,
            plan.prefill_prompts,
            least_tokens=self._least_prefill_tokens,
            implementation=self._device.prefill_implementation,
        )
        self._pending: decode.Chunk | None = None
        self._state = None  # frees the old one first
        self._state = self._device.empty(plan)
        self._say(plan.line())

    def submit(
        self,
        prompt: Example,
        samplings: Sequence[Sampling],
        key: jax.Array,
        *,
        numbers: Sequence[int],
    ) -> list[Stream]:
        """Queue responses to a prompt, which is read once for all of them.

        Args:
          samplings: of each response, its limit and end tokens included.
          numbers: of each response; a response is a function of parameters, prompt, sampling, key
            and number.

        Raises:
          ValueError: the session has no room for such a prompt or response.
        """
        self._check(prompt, samplings)
        group = Group(
            prompt=prompt,
            start=prefill.next_position(prompt, self._device.config),
            waiting=collections.deque(),
        )
        key_data = np.asarray(jax.random.key_data(key))
        for sampling, number in zip(samplings, numbers, strict=True):
            group.waiting.append(
                Ticket(group=group, number=number, sampling=sampling, key_data=key_data)
            )
        streams = [Stream(self, ticket) for ticket in group.waiting]
        with self._changed:
            self._queue.append(group)
            self._num_left += len(streams)
            self._changed.notify_all()
        return streams

    def _check(self, prompt: Example, samplings: Sequence[Sampling]) -> None:
        # The plan's places are rounded up, for another number of slots otherwise; a row that reads
        # prompts has room for the work's alone.
        tokens, patches, frames = prefill.measure(prompt)
        work = self._work
        for name, value, limit in (
            ("prompt tokens", tokens, work.prompt_tokens),
            ("patches", patches, work.prompt_patches),
            ("frames", frames, work.prompt_images),
            ("max_tokens", max(one.max_tokens for one in samplings), work.response_tokens),
            ("end tokens", max(len(one.end_token_ids) for one in samplings), self._num_ends),
        ):
            if value > limit:
                raise ValueError(f"the session has room for {limit} {name}, got {value}")

    def cancel(self, ticket: Ticket) -> None:
        """End a response with the next look."""
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify_all()

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        """Wait until a condition holds, driving the device where no thread does."""
        while True:
            with self._changed:
                if self._thread is not None:
                    self._changed.wait_for(lambda: is_so() or self._error or self._is_closed)
                if self._error is not None:
                    raise RuntimeError("the sampler's thread failed") from self._error
                if is_so():
                    return
                if self._is_closed:
                    raise RuntimeError("the session was closed before the response was done")
            self.look()

    def start(self) -> None:
        """Drive the device in a thread, until `close`."""
        self._thread = threading.Thread(target=self._serve, name="sampler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and free the device's memory."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._state = self._pending = None

    def _serve(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._num_left or self._is_closed)
                    if self._is_closed:
                        return
                self.look()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def look(self) -> list[Ticket]:
        """Read the last chunk, fill the slots and send the next; return the finished responses.

        Where the devices' memory is short after all, go on with half of the slots: responses that
        were on their way are drawn again, and are the same.
        """
        return self._in_memory(self._look) or []

    def compile_prefill(self, prompts: Sequence[Example]) -> None:
        """Compile the programs that read prompts like these, of each level; before the first look.

        Args:
          prompts: those that are larger than a level are read by the others.
        """
        while self._in_memory(lambda: self._read_at_each_level(prompts)) is None:
            pass

    def _read_at_each_level(self, prompts: Sequence[Example]) -> bool:
        for level in self.levels:
            for prompt in prompts:
                if prefill.holds(level, prompt):
                    # The entry is beyond the store, which keeps nothing of it.
                    first = [(self.plan.num_prompts, prompt)]
                    call = [first, *[[]] * (self.plan.num_parts - 1)]
                    self._state = self._device.fill(
                        self._params, self._state, call, level, self.plan
                    )
        jax.block_until_ready(self._state)
        return True

    def _in_memory(self, act: Callable[[], _T]) -> _T | None:
        """Return what it gives; None where memory was short and half of the slots are left."""
        try:
            return act()
        except jax.errors.JaxRuntimeError as error:
            slots = self.plan.num_slots
            if _OUT_OF_MEMORY not in str(error) or slots == 1 or jax.process_count() > 1:
                raise
            self._say(f"{_OUT_OF_MEMORY} with {slots} slots a part, going on with half of them")
        limits = dataclasses.replace(self._limits, num_slots=slots // 2 * self.plan.num_parts)
        self._requeue()
        self._plans[self._sizes] = memory.make(self._device.config, self._work, limits)
        self._open(self._plans[self._sizes])
        return None

    def _requeue(self) -> None:
        """Put every response that is in a slot back to its group, and the groups to the queue."""
        groups = [group for part in self._slots.entries for group in part if group is not None]
        for group in groups:
            running = sorted(group.running, key=lambda ticket: ticket.number)
            group.waiting.extendleft(reversed(running))
            group.running.clear()
            group.part = -1
        for ticket in self._slots.tickets:
            if ticket is not None:
                ticket.slot, ticket.count = None, 0
        self._queue.extendleft(reversed(groups))

    def _look(self) -> list[Ticket]:
        chunk = None if self._pending is None else jax.device_get(self._pending)
        self._pending = None
        look = None
        if chunk is not None:
            look = self._collect(chunk)
        self._finished += self._drop_cancelled()
        self._send()
        finished, self._finished = self._finished, []
        with self._changed:
            for ticket in finished:
                ticket.is_done = True
            self._num_finished += len(finished)
            self._num_left -= len(finished)
            self._changed.notify_all()
        if look is not None and self._on_look is not None:
            self._on_look(
                dataclasses.replace(look, num_finished=self._num_finished, num_left=self._num_left)
            )
        return finished

    def _collect(self, chunk: decode.Chunk) -> Look:
        """Give each response its new tokens; those that are done leave their slots."""
        counts = np.zeros((2, len(self._slots.tickets)), np.int32)
        for slot, ticket in enumerate(self._slots.tickets):
            if ticket is None:
                continue
            ticket.is_fresh = False
            new = int(chunk.counts[slot]) - ticket.count
            # A response that is drawn again has handed out its first tokens before.
            known = min(new, len(ticket.tokens) - ticket.count)
            ticket.count += new
            counts[:, slot] = ticket.count, new
            ticket.logprobs.extend(chunk.logprobs[slot, known:new].tolist())
            ticket.tokens.extend(chunk.tokens[slot, known:new].tolist())
            if chunk.is_ended[slot] or ticket.count >= ticket.sampling.max_tokens:
                ticket.is_ended = bool(chunk.is_ended[slot])
                self._finished.append(ticket)
                self._slots.release(ticket)
        return Look(
            num_steps=int(chunk.num_steps),
            tokens=counts[0],
            new_tokens=counts[1],
            prompt_tokens=self._prompt_tokens,
            reader_tokens=self._reader_tokens,
            prefill_tokens=self._prefill_tokens,
            num_finished=0,
            num_left=0,
        )

    def _drop_cancelled(self) -> list[Ticket]:
        with self._changed:
            cancelled, self._cancelled = self._cancelled, []
        dropped = [ticket for ticket in dict.fromkeys(cancelled) if not ticket.is_done]
        dropped = [t for t in dropped if t.slot is not None or t in t.group.waiting]
        for ticket in dropped:
            self._slots.release(ticket)
        return dropped

    def _send(self) -> None:
        """Fill the slots and send the next chunk to the device, where there is something to do."""
        slots, device = self._slots, self._device
        for move in slots.moves():
            self._state = device.move(self._state, move, self.plan)
        with self._changed:
            new = slots.fill(self._queue)
        parts = [[(group.entry, group.prompt) for group in part] for part in new]
        for shape, call in prefill.split(parts, self.levels, call_tokens=_CALL_TOKENS):
            self._state = device.fill(self._params, self._state, call, shape, self.plan)
        if slots.is_idle():
            return
        self._prefill_tokens = sum(len(p.tokens) for part in parts for _, p in part)
        read = [g for part in slots.entries for g in part if g is not None and g.running]
        self._prompt_tokens = sum(len(group.prompt.tokens) for group in read)
        self._reader_tokens = sum(len(g.prompt.tokens) * len(g.running) for g in read)
        mode = Mode.of([ticket.sampling for ticket in slots.tickets if ticket is not None])
        self._state, self._pending = device.advance(
            self._params, self._state, self._control(), mode, self._key_impl, self.plan
        )

    def _control(self) -> decode.Control:
        """Return the host's decisions for a chunk."""
        slots, plan = self._slots, self.plan
        tickets, usual = slots.tickets, next(t for t in slots.tickets if t is not None)
        shown = [usual if ticket is None else ticket for ticket in tickets]
        ends = np.full((len(tickets), self._num_ends), -1, np.int32)
        for row, ticket in zip(ends, shown, strict=True):
            row[: len(ticket.sampling.end_token_ids)] = ticket.sampling.end_token_ids

        def each(value: Callable[[Ticket], int]) -> np.ndarray:
            values = [0 if ticket is None else value(ticket) for ticket in tickets]
            return np.array(values, np.int32)

        entries = plan.num_parts * plan.num_prompts
        return decode.Control(
            is_open=np.array([ticket is not None for ticket in tickets]),
            is_fresh=each(lambda ticket: ticket.is_fresh).astype(bool),
            prompt=each(lambda ticket: ticket.group.entry),
            place=each(lambda ticket: ticket.place),
            starts=each(lambda ticket: ticket.group.start),
            limits=each(slots.limit),
            ends=ends,
            keys=np.stack([ticket.key_data for ticket in shown]),
            numbers=np.array([ticket.number for ticket in shown], np.uint32),
            settings=Settings.of([ticket.sampling for ticket in shown]),
            # Copies: the device may still read these arrays when they change.
            prompt_lengths=slots.prompt_lengths.reshape(entries).copy(),
            readers=slots.readers.reshape(entries, plan.width).copy(),
        )
