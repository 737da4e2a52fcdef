"""Batches as a function of the step: prefetched in threads by Grain, resumed exactly."""

from collections.abc import Callable
from typing import Any

import grain

from prism_jax import errors

_VERSION = 2


class Steps:
    """An iterator over `make(0), make(1), …`; the position is the number of the next step.

    Each process makes a part of the same steps, so a run may resume with another number of
    processes.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        *,
        num_steps: int,
        identity: dict[str, Any],
        num_threads: int,
    ):
        """Start at step 0.

        Args:
          make: called in threads; must not depend on anything but the step.
          num_steps: after which the iterator ends.
          identity: JSON values that identify the data of the steps; a position with other values is
            refused. A value of None is unknown and is not compared.
          num_threads: steps made in parallel.
        """
        self._identity = {"version": _VERSION} | identity
        self._next = 0
        dataset = grain.MapDataset.range(num_steps).map(lambda step: [make(int(step))])
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 1)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __iter__(self) -> "Steps":
        return self

    def __next__(self) -> Any:
        (made,) = next(self._iterator)
        self._next += 1
        return made

    def get_state(self) -> dict[str, Any]:
        """Return the position and the identity of its data, as JSON values."""
        return {"next_step": self._next} | self._identity

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at a position.

        Raises:
          InputError: the position belongs to other data, another seed or another batch size.
        """
        for name, value in self._identity.items():
            is_unknown = value is None or state.get(name, value) is None
            if not is_unknown and state.get(name) != value:
                raise errors.InputError(
                    f"cannot resume: data {name} was {state.get(name)} when the checkpoint was "
                    f"written and is {value} now"
                )
        self._next = state["next_step"]
        self._iterator.set_state({"next_index": self._next})

    def close(self) -> None:
        """Stop the prefetching threads."""
        self._iterator.close()
