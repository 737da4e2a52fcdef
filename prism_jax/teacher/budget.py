"""Keep what replies cost below a limit, with many requests under way at a time."""

import dataclasses
import threading

from prism_jax.teacher import reply

_PER_PRICE_TOKENS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prices:
    """Say what a million tokens cost, in whatever currency the budget is."""

    input_million: float
    output_million: float

    def cost(self, usage: reply.Usage) -> float:
        """Return the price of a reply."""
        tokens = usage.input_tokens * self.input_million + usage.output_tokens * self.output_million
        return tokens / _PER_PRICE_TOKENS


class Budget:
    """Admit requests as long as all of them together can be paid. Safe to use from any thread.

    Before a request is sent its dearest reply is set aside: as many tokens as it may write, and as
    many input tokens as any request had so far. So the limit is exceeded at most by what the input
    of the requests under way is longer than that, or by replies that end in an error.

    Args:
      limit: what all replies may cost together; None: anything.
      spent: what was paid before.
      max_tokens: that a reply may have.
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
        """Return what was paid so far."""
        with self._changed:
            return self._spent

    def reserve(self) -> float | None:
        """Set a request's dearest reply aside and return its price; None: it cannot be paid.

        Waits while only the requests under way stand against it.
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
        """Enter what a reply cost, usable or not."""
        with self._changed:
            self._spent += self._prices.cost(usage)
            self._largest_input_tokens = max(self._largest_input_tokens, usage.input_tokens)
            self._changed.notify_all()

    def release(self, amount: float) -> None:
        """Give back what `reserve` set aside."""
        with self._changed:
            self._num_under_way -= 1
            # Sums of floats leave a rest, which must not stand against anybody.
            self._reserved = self._reserved - amount if self._num_under_way else 0.0
            self._changed.notify_all()
