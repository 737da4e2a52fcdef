"""The assignment of responses to slots, decided on the host between two chunks.

  queue    group 3, group 4, …             a group: one prompt and responses to it
  prompts  [group 0] [group 2] [    -   ]  a part's store; a group stays while responses are left
  slots    [0.1] [0.3] [2.0] | [0.2] [-]   short ones, then long ones

A finished response leaves its slot, and the next takes it: of a group whose prompt is stored
already, else of the next group. A response that fills its slot moves to one with more places; it
waits where none is free, so that memory bounds the number in flight, never their length.
"""

import collections
import dataclasses

import numpy as np

from models import inputs
from prism_jax.rollout.memory import Plan
from prism_jax.rollout.sampling import Sampling


@dataclasses.dataclass(eq=False, kw_only=True)
class Ticket:
    """A response as it grows, and where it stands."""

    group: "Group"
    number: int  # folded into the key
    sampling: Sampling
    key_data: np.ndarray
    tokens: list[int] = dataclasses.field(default_factory=list)  # handed out so far
    logprobs: list[float] = dataclasses.field(default_factory=list)
    is_ended: bool = False  # by an end token
    is_done: bool = False  # by one, by its limit, or cancelled
    slot: int | None = None  # over all parts
    place: int = 0  # among the prompt's readers
    count: int = 0  # tokens drawn; fewer than handed out where it is drawn again
    is_fresh: bool = False  # it begins with the next chunk


@dataclasses.dataclass(eq=False, kw_only=True)
class Group:
    """A prompt and the responses to it that share its keys and values."""

    prompt: inputs.Example
    start: int  # M-RoPE position of a response's first token
    waiting: collections.deque[Ticket]
    running: set[Ticket] = dataclasses.field(default_factory=set)
    part: int = -1
    entry: int = -1  # of the part's prompt store


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
    """One response of each part that moves to a longer slot."""

    source_class: int
    target_class: int
    sources: np.ndarray  # int32[parts]  -1: none
    targets: np.ndarray


class Slots:
    """The slots and prompt stores of all parts."""

    def __init__(self, plan: Plan):
        self.plan = plan
        parts, slots = plan.num_parts, plan.num_slots
        self.tickets: list[Ticket | None] = [None] * (parts * slots)
        self.entries: list[list[Group | None]] = [[None] * plan.num_prompts for _ in range(parts)]
        self.readers = np.full((parts, plan.num_prompts, plan.width), -1, np.int32)
        self.prompt_lengths = np.ones((parts, plan.num_prompts), np.int32)
        ends = np.cumsum([rows for rows, _ in plan.classes])
        self._class_of = np.repeat(np.arange(len(plan.classes)), [n for n, _ in plan.classes])
        self._places = np.array([places for _, places in plan.classes])
        # Free slots by part and class, the first one last.
        self._free = [
            [
                list(range(int(end) - 1, int(end) - 1 - rows, -1))
                for end, (rows, _) in zip(ends, plan.classes, strict=True)
            ]
            for _ in range(parts)
        ]

    def is_idle(self) -> bool:
        """Return whether no slot holds a response."""
        return all(ticket is None for ticket in self.tickets)

    def limit(self, ticket: Ticket) -> int:
        """Return the tokens at which the response of a slot pauses or ends."""
        local = ticket.slot % self.plan.num_slots
        return min(ticket.sampling.max_tokens, int(self._places[self._class_of[local]]))

    def _is_full(self, ticket: Ticket) -> bool:
        return self.limit(ticket) <= ticket.count < ticket.sampling.max_tokens

    def release(self, ticket: Ticket) -> None:
        """Free the slot of a response that is done, and its prompt if no other reads it."""
        group = ticket.group
        if ticket.slot is None:
            if ticket in group.waiting:
                group.waiting.remove(ticket)
        else:
            self._leave(ticket)
            group.running.discard(ticket)
            self.readers[group.part, group.entry, ticket.place] = -1
        if group.part >= 0 and not group.running and not group.waiting:
            self.entries[group.part][group.entry] = None
            group.part = -1

    def _leave(self, ticket: Ticket) -> None:
        part, local = divmod(ticket.slot, self.plan.num_slots)
        self.tickets[ticket.slot] = None
        self._free[part][self._class_of[local]].append(local)
        ticket.slot = None

    def _enter(self, ticket: Ticket, part: int, local: int) -> None:
        group = ticket.group
        ticket.slot = part * self.plan.num_slots + local
        self.tickets[ticket.slot] = ticket
        self.readers[part, group.entry, ticket.place] = local

    def moves(self) -> list[Move]:
        """Give responses that fill their slots longer ones, as far as some are free."""
        moves = []
        # The longest first: the slots that they leave are free for the others.
        for source_class in reversed(range(len(self.plan.classes) - 1)):
            full = [[] for _ in range(self.plan.num_parts)]
            for slot, ticket in enumerate(self.tickets):
                part, local = divmod(slot, self.plan.num_slots)
                is_here = self._class_of[local] == source_class
                if ticket is not None and is_here and self._is_full(ticket):
                    full[part].append(ticket)
            for target_class in range(source_class + 1, len(self.plan.classes)):
                moves += self._move_all(full, source_class, target_class)
        return moves

    def _move_all(
        self, full: list[list[Ticket]], source_class: int, target_class: int
    ) -> list[Move]:
        moves = []
        while True:
            sources, targets = np.full((2, self.plan.num_parts), -1, np.int32)
            for part, tickets in enumerate(full):
                free = self._free[part][target_class]
                if tickets and free:
                    ticket, local = tickets.pop(0), free.pop()
                    sources[part] = ticket.slot % self.plan.num_slots
                    targets[part] = local
                    self._leave(ticket)
                    self._enter(ticket, part, local)
            if (sources < 0).all():
                return moves
            moves.append(
                Move(
                    source_class=source_class,
                    target_class=target_class,
                    sources=sources,
                    targets=np.where(sources < 0, self._first(target_class), targets),
                )
            )

    def _first(self, slot_class: int) -> int:
        return int(np.argmax(self._class_of == slot_class))

    def _free_slot(self, part: int) -> int | None:
        """Return a free slot of a part, a short one where there is one."""
        for free in self._free[part]:
            if free:
                return free[-1]
        return None

    def fill(self, queue: collections.deque[Group]) -> list[list[Group]]:
        """Give free slots to waiting responses; return each part's groups that must be read."""
        new: list[list[Group]] = [[] for _ in range(self.plan.num_parts)]
        for part in range(self.plan.num_parts):
            for group in self.entries[part]:
                if group is not None:
                    self._fill_from(group)
        while queue:
            part = self._emptiest()
            if part is None:
                break
            group = queue.popleft()
            if not group.waiting:  # all its responses were cancelled
                continue
            group.part, group.entry = part, self.entries[part].index(None)
            self.entries[part][group.entry] = group
            self.readers[part, group.entry] = -1
            self.prompt_lengths[part, group.entry] = len(group.prompt.tokens)
            new[part].append(group)
            self._fill_from(group)
        return new

    def _emptiest(self) -> int | None:
        """Return the part with most free slots among those that can take one more prompt."""
        best, most = None, 0
        for part in range(self.plan.num_parts):
            num_free = sum(map(len, self._free[part]))
            if num_free > most and None in self.entries[part]:
                best, most = part, num_free
        return best

    def _fill_from(self, group: Group) -> None:
        while group.waiting and len(group.running) < self.plan.width:
            local = self._free_slot(group.part)
            if local is None:
                return
            ticket = group.waiting.popleft()
            self._free[group.part][self._class_of[local]].remove(local)
            ticket.place = int(np.argmax(self.readers[group.part, group.entry] < 0))
            ticket.count, ticket.is_fresh = 0, True
            group.running.add(ticket)
            self._enter(ticket, group.part, local)
