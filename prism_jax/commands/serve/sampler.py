"""The sampler of the server: a thread that looks after the slots, and responses as they come.

  event loop   submit, cancel          hand_out: new tokens to whoever waits for them
  thread              look, look, look …      (one chunk of all slots a look)

All methods belong to the event loop; only `_drive` runs in the thread. The thread waits for
nobody: it leaves the tokens of a look where the event loop finds them, and goes on.
"""

import asyncio
import dataclasses
import sys
import threading
from collections.abc import Callable, Sequence

import jax

from models.inputs import Example
from prism_jax.commands.serve import refusals
from prism_jax.commands.serve.refusals import Refusal
from prism_jax.rollout.sampling import Sampling
from prism_jax.rollout.session import Session, Stream

_MOST_RETRY_SECONDS = 60
_SMOOTHING = 0.1
# Between two chunks the thread takes Python's lock some dozen times, each time after so long where
# the event loop or an encoder is busy, and the device waits. Python's own value is 5 ms.
_SWITCH_SECONDS = 0.0002


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The next tokens of a response."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    is_done: bool


class Response:
    """One response while it is drawn.

    Args:
      listener: is called in the event loop when there is a part to take.
      is_whole: the listener needs no parts: it is called for the first token and for the end.
    """

    def __init__(
        self, stream: Stream, begun: float, listener: Callable[["Response"], None], is_whole: bool
    ):
        self._stream, self.begun = stream, begun
        self._listener, self._is_whole = listener, is_whole
        self._num_taken = 0
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

    @property
    def num_tokens(self) -> int:
        """Return the tokens drawn so far."""
        return len(self._stream.ticket.tokens)

    def wake(self) -> None:
        """Call the listener where there is something for it."""
        is_new = self.num_tokens > self._num_taken
        if self._is_whole and self._num_taken:
            is_new = False
        if is_new or self.is_done or self.error is not None:
            self._listener(self)

    def cancel(self) -> None:
        """End it where it is, with the next look."""
        self._stream.cancel()

    def take(self) -> Part:
        """Return the tokens that were not taken yet; the last part is done.

        Raises:
          RuntimeError: the sampler has failed.
        """
        if self.error is not None:
            raise RuntimeError("the sampler has failed") from self.error
        ticket, first = self._stream.ticket, self._num_taken
        # In this order: a response that is done grows no more, and a token's log-probability is
        # there before the token.
        is_done, last = ticket.is_done, len(ticket.tokens)
        self._num_taken = last
        return Part(
            tokens=ticket.tokens[first:last],
            logprobs=ticket.logprobs[first:last],
            is_done=is_done,
        )


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
        self._is_woken = False  # to hand out tokens
        self._work = threading.Event()
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
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
        self,
        prompt: Example,
        sampling: Sampling,
        key: jax.Array,
        listeners: Sequence[Callable[[Response], None]],
        *,
        is_whole: bool,
    ) -> list[Response]:
        """Queue responses to a prompt, one for each listener; see `Response`.

        Raises:
          Refusal: there is no room, or the sampler has failed.
          ValueError: the prompt is larger than the session has room for.
        """
        num_responses = len(listeners)
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
        begun = self._loop.time()
        responses = [
            Response(stream, begun, listener, is_whole)
            for stream, listener in zip(streams, listeners, strict=True)
        ]
        self._live |= dict.fromkeys(responses)
        with self._lock:
            self._num_left += len(responses)
        self._work.set()
        return responses

    def cancel(self, responses: Sequence[Response]) -> None:
        """End those responses that are not done, with the next look."""
        unfinished = [response for response in responses if not response.is_done]
        for response in unfinished:
            response.cancel()
        if unfinished:
            self._work.set()

    async def close(self) -> None:
        """Stop the thread and free the slots."""
        self._is_closing = True
        self._work.set()
        await asyncio.to_thread(self._thread.join)
        sys.setswitchinterval(self._switch_seconds)
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
                # Where the event loop is behind, it finds the tokens of several looks together.
                if not self._is_woken:
                    self._is_woken = True
                    self._loop.call_soon_threadsafe(self._hand_out)
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._fail, error)

    def _hand_out(self) -> None:
        # Before the tokens are read: a look from now on must wake the loop again.
        self._is_woken = False
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
