"""The sampler of the server: a thread that looks after the slots, and responses as they come.

  event loop   submit, cancel          hand_out: new tokens to whoever waits for them
  thread              look, look, look …      (one chunk of all slots a look)

All methods belong to the event loop; only `_drive` runs in the thread.
"""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Sequence

import jax

from models.inputs import Example
from prism_jax.commands.serve import refusals
from prism_jax.commands.serve.refusals import Refusal
from prism_jax.rollout.sampling import Sampling
from prism_jax.rollout.session import Session, Stream

_MOST_RETRY_SECONDS = 60
_SMOOTHING = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The next tokens of a response."""

    drawn: tuple[tuple[int, float], ...]  # each with its log-probability
    is_done: bool


class Response:
    """One response while it is drawn."""

    def __init__(self, stream: Stream, begun: float):
        self._stream, self.begun = stream, begun
        self._given = 0
        self._is_new = asyncio.Event()
        self.error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        """Return whether no more tokens come."""
        return self._stream.ticket.is_done

    @property
    def is_ended(self) -> bool:
        """Return whether an end token ended it, not its limit."""
        return self._stream.ticket.is_ended

    @property
    def is_running(self) -> bool:
        """Return whether it has a slot."""
        return self._stream.ticket.slot is not None

    def wake(self) -> None:
        """Hand out what is new."""
        ticket = self._stream.ticket
        if self.error is not None or ticket.is_done or len(ticket.tokens) > self._given:
            self._is_new.set()

    def cancel(self) -> None:
        """End it where it is, with the next look."""
        self._stream.cancel()

    async def parts(self) -> AsyncIterator[Part]:
        """Yield tokens as they come; the last part is done."""
        ticket = self._stream.ticket
        while True:
            await self._is_new.wait()
            self._is_new.clear()
            if self.error is not None:
                raise RuntimeError("the sampler has failed") from self.error
            # In this order: a response that is done grows no more.
            is_done, new = ticket.is_done, range(self._given, len(ticket.tokens))
            self._given = new.stop
            drawn = tuple((ticket.tokens[n], ticket.logprobs[n]) for n in new)
            yield Part(drawn=drawn, is_done=is_done)
            if is_done:
                return


class Sampler:
    """The slots of a session and the queue before them."""

    def __init__(
        self,
        session: Session,
        *,
        most_waiting: int,
        group_responses: int,
        on_failure: Callable[[BaseException], None],
    ):
        """Start the thread; call in the event loop.

        Args:
          most_waiting: responses that may wait for a slot.
          group_responses: most responses to a prompt that share it, see `memory.Work`.
          on_failure: is called when the thread has failed; no response is drawn any more.
        """
        self._session, self._loop = session, asyncio.get_running_loop()
        self.num_slots = session.plan.num_parts * session.plan.num_slots
        self._most_waiting, self._group_responses = most_waiting, group_responses
        self._on_failure = on_failure
        self._live: dict[Response, None] = {}
        self._usual_seconds = 1.0  # of a response, from its arrival to its end
        self.error: BaseException | None = None
        self._lock = threading.Lock()
        self._num_left = 0  # not yet finished, as the thread counts
        self._is_closing = False
        self._work = threading.Event()
        self._thread = threading.Thread(target=self._drive, name="sampler", daemon=True)
        self._thread.start()

    @property
    def most_responses(self) -> int:
        """Return how many responses have room, in slots and in the queue."""
        return self.num_slots + self._most_waiting

    def num_live(self) -> int:
        """Return the responses that are not finished."""
        return len(self._live)

    def num_running(self) -> int:
        """Return the responses in slots."""
        return sum(response.is_running for response in self._live)

    def retry_seconds(self) -> int:
        """Return after how long a client may find room: when the queue has become shorter."""
        rounds = self.num_live() / self.num_slots
        return max(1, min(_MOST_RETRY_SECONDS, round(rounds * self._usual_seconds)))

    def submit(
        self, prompt: Example, sampling: Sampling, key: jax.Array, *, num_responses: int
    ) -> list[Response]:
        """Queue responses to a prompt.

        Raises:
          Refusal: there is no room, or the sampler has failed.
          ValueError: the prompt is larger than the session has room for.
        """
        if self.error is not None:
            raise Refusal("the sampler has failed", status=503, code="failed")
        if self.num_live() + num_responses > self.most_responses:
            raise refusals.too_busy(
                f"{self.num_live()} responses are drawn or wait, there is room for "
                f"{self.most_responses}",
                self.retry_seconds(),
            )
        streams: list[Stream] = []
        for first in range(0, num_responses, self._group_responses):
            numbers = range(first, min(first + self._group_responses, num_responses))
            streams += self._session.submit(
                prompt, [sampling] * len(numbers), key, numbers=list(numbers)
            )
        responses = [Response(stream, self._loop.time()) for stream in streams]
        self._live |= dict.fromkeys(responses)
        with self._lock:
            self._num_left += len(responses)
        self._work.set()
        return responses

    def cancel(self, responses: Sequence[Response]) -> None:
        """End those responses that are not done, with the next look."""
        for response in responses:
            if not response.is_done:
                response.cancel()
        self._work.set()

    async def close(self) -> None:
        """Stop the thread and free the slots."""
        self._is_closing = True
        self._work.set()
        await asyncio.to_thread(self._thread.join)
        self._session.close()

    def _drive(self) -> None:
        try:
            while True:
                self._work.wait()
                if self._is_closing:
                    return
                # Before the look: what is submitted during it sets the event again.
                self._work.clear()
                num_finished = len(self._session.look())
                with self._lock:
                    self._num_left -= num_finished
                    if self._num_left:
                        self._work.set()
                self._loop.call_soon_threadsafe(self._hand_out)
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._fail, error)

    def _hand_out(self) -> None:
        for response in [*self._live]:
            if response.is_done:
                del self._live[response]
                seconds = self._loop.time() - response.begun
                self._usual_seconds += _SMOOTHING * (seconds - self._usual_seconds)
            response.wake()

    def _fail(self, error: BaseException) -> None:
        self.error = error
        for response in self._live:
            response.error = error
            response.wake()
        self._live.clear()
        self._on_failure(error)
