"""A function over many items in threads, in order and in bounded memory."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

_HELD_BYTES = 256 << 20


def ordered_map(
    function, items: Iterable, num_threads: int, *, weigh: Callable[[Any], int] = lambda item: 0
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, function(item)) in order; only a few items are in memory at a time.

    Args:
      weigh: gives the bytes of an item, of which only so many are held.
    """
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        waiting: collections.deque = collections.deque()
        held = 0
        for item in items:
            weight = weigh(item)
            held += weight
            waiting.append((item, pool.submit(function, item), weight))
            while len(waiting) > 4 * num_threads or (waiting and held > _HELD_BYTES):
                earlier, future, weight = waiting.popleft()
                held -= weight
                yield earlier, future.result()
        for item, future, _ in waiting:
            yield item, future.result()


def held_bytes(value: Any) -> int:
    """Return about how many bytes the texts and pictures of a row take."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(held_bytes, value.values()))
    return sum(map(held_bytes, value)) if isinstance(value, list) else 0
