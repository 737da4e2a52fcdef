"""A budget for the cost of replies, shared by concurrent requests."""

import dataclasses
import threading

from prism_jax.teacher import reply

_PER_PRICE_TOKENS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of a million tokens, in the currency of the budget."""

    input_million: float
    output_million: float

    def cost(self, usage: reply.Usage) -> float:
        """Return the price of a reply."""
        tokens = usage.input_tokens * self.input_million + usage.output_tokens * self.output_million
        return tokens / _PER_PRICE_TOKENS


class Budget:
    """An account that admits requests only while it can pay for all of them. Thread-safe.

    Before a request is sent, the price of its most expensive reply is reserved: the maximum of
    output tokens, and the longest input seen so far. The limit can therefore be exceeded only by
    requests with longer inputs, or by replies that end in an error.

    Args:
      limit: of the total cost; None: no limit.
      spent: the cost of earlier replies.
      max_tokens: of a reply.
    """

    def __init__(self, limit: float | None, *, spent: float, prices: Prices, max_tokens: int):
        self._limit = limit
        self._spent = spent
        self._prices = prices
        self._max_tokens = max_tokens
        self._largest_input_tokens = 0
        self._reserved = 0.0
        self._num_under_way = 0
        self._changed = threading.Condition()

    @property
    def spent(self) -> float:
        """Return the cost of all replies so far."""
        with self._changed:
            return self._spent

    def reserve(self) -> float | None:
        """Reserve the price of a request's most expensive reply and return it; None: too much.

        Waits while the reservations of other requests are all that stands in the way.
        """
        with self._changed:
            while True:
                usage = reply.Usage(
                    input_tokens=self._largest_input_tokens, output_tokens=self._max_tokens
                )
                amount = self._prices.cost(usage)
                if self._limit is None or self._spent + self._reserved + amount <= self._limit:
                    self._reserved += amount
                    self._num_under_way += 1
                    return amount
                if self._num_under_way == 0 or self._spent + amount > self._limit:
                    return None
                self._changed.wait()

    def pay(self, usage: reply.Usage) -> None:
        """Add the cost of a reply, usable or not."""
        with self._changed:
            self._spent += self._prices.cost(usage)
            self._largest_input_tokens = max(self._largest_input_tokens, usage.input_tokens)
            self._changed.notify_all()

    def release(self, amount: float) -> None:
        """Cancel a reservation of `reserve`."""
        with self._changed:
            self._num_under_way -= 1
            # Rounding leaves a remainder, which must not count against later requests.
            self._reserved = self._reserved - amount if self._num_under_way else 0.0
            self._changed.notify_all()
