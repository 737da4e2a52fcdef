"""Map a function over items in threads, in order and in bounded memory."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

_HELD_BYTES = 256 << 20


def ordered_map(
    function, items: Iterable, num_threads: int, *, weigh: Callable[[Any], int] = lambda item: 0
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, function(item)) in order, with only a few items in memory at a time.

    Args:
      weigh: returns the bytes of an item; their sum in memory is bounded.
    """
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        waiting: collections.deque = collections.deque()
        waiting_bytes = 0
        for item in items:
            weight = weigh(item)
            waiting_bytes += weight
            waiting.append((item, pool.submit(function, item), weight))
            while len(waiting) > 4 * num_threads or (waiting and waiting_bytes > _HELD_BYTES):
                earlier, future, weight = waiting.popleft()
                waiting_bytes -= weight
                yield earlier, future.result()
        for item, future, _ in waiting:
            yield item, future.result()


def held_bytes(value: Any) -> int:
    """Return the approximate size in bytes of a row's texts and pictures."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(held_bytes, value.values()))
    return sum(map(held_bytes, value)) if isinstance(value, list) else 0
