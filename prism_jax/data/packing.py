"""The rows in which sequences stand: best-fit packing, a few rows at a time.

The plan is a function of sizes and seed alone, so every process knows every row of every step, a
run continues anywhere, and an epoch is a whole number of steps in which each example stands once.
"""

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np

from prism_jax import errors
from prism_jax.data import encode

Row = tuple[int, ...]  # numbers of examples
# Part of a run's identity: another rule would give other rows.
RULE = "best fit, largest first"
_FULL = 0.97  # of a row's largest kind of place; rows with more left are filled once more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The places of one row, by kind."""

    tokens: int
    patches: int
    images: int
    examples: int

    def misfit(self, size: encode.Size) -> str | None:
        """Return why a sequence does not even fit an empty row; None when it does."""
        for name in ("tokens", "patches", "images"):
            has, limit = vars(size)[name], vars(self)[name]
            if has > limit:
                return f"{has} {name}, the limit is {limit}"
        return None


def best_fit(
    sizes: np.ndarray, order: np.ndarray, limits: Limits, *, num_open_rows: int
) -> list[Row]:
    """Fill some rows at a time: the largest example first, into the row it leaves least place in.

    Examples of as many rows are taken in the given order. Of the rows that are then made, those
    that are not full are given up once, and their examples join the next ones.

    Args:
      sizes: int[examples, 3]: tokens, patches and images of each example; each fits an empty row.
      order: numbers of examples, each as often as it is to stand in a row.
      num_open_rows: rows that are filled at a time.

    Returns:
      The rows, and in each the examples, in the order of `order`, by the first example of a row.
    """
    whole = np.array([limits.tokens, limits.patches, limits.images, limits.examples])
    needs = np.concatenate([sizes, np.ones((len(sizes), 1), np.int64)], axis=1)
    # No example needs a kind that the rows have no place for.
    shares = needs / np.maximum(whole, 1)
    # Places of the order up to each, in rows, by the kind of which most is needed.
    ends = shares[order].cumsum(0).max(-1)
    rows: list[Row] = []
    start, carried = 0, []
    while start < len(order) or carried:
        taken = ends[start - 1] if start else 0.0
        room = max(num_open_rows - shares[order[carried]].sum(0).max(initial=0.0), 1.0)
        stop = max(int(np.searchsorted(ends, taken + room, side="right")), start + 1)
        window = [*carried, *range(start, min(stop, len(order)))]
        start = min(stop, len(order))
        made = _fill(window, order, needs, shares, whole)
        full_rows, given_up = made, []
        if start < len(order):
            old = set(carried)
            is_kept = [
                shares[order[row]].sum(0).max() >= _FULL or not old.isdisjoint(row) for row in made
            ]
            full_rows = [row for row, keep in zip(made, is_kept, strict=True) if keep]
            given_up = [row for row, keep in zip(made, is_kept, strict=True) if not keep]
        carried = sorted(place for row in given_up for place in row)
        rows += [tuple(int(order[place]) for place in row) for row in full_rows]
    return rows


def _fill(
    window: Sequence[int],
    order: np.ndarray,
    needs: np.ndarray,
    shares: np.ndarray,
    whole: np.ndarray,
) -> list[list[int]]:
    """Return rows of places in the order, each sorted, by their first place."""
    largest_first = sorted(window, key=lambda place: (-shares[order[place]].max(), place))
    left = np.zeros((len(window), len(whole)), np.int64)
    is_limited = np.array([*(whole[:-1] > 0), False])  # a slot that stays free costs little
    rows: list[list[int]] = []
    for place in largest_first:
        need = needs[order[place]]
        (fits,) = np.nonzero((left[: len(rows)] >= need).all(-1))
        if len(fits):
            after = (left[fits] - need)[:, is_limited] / whole[is_limited]
            row = int(fits[np.argmin(after.min(-1))])
        else:
            row = len(rows)
            left[row] = whole
            rows.append([])
        left[row] -= need
        rows[row].append(place)
    return sorted(sorted(row) for row in rows)


def epoch_order(
    lengths: Sequence[int], weights: Sequence[float], *, seed: int | None, epoch: int
) -> np.ndarray:
    """Return the numbers of the examples of one epoch in order; sources count on from each other.

    Without weights every example stands once. With weights an epoch has as many places as there
    are examples, shared out by weight, and each source goes round by itself from epoch to epoch.

    Args:
      lengths: examples of each source.
      weights: of each source, or empty.
      seed: of the order, new in every epoch; None keeps the order of the examples.
    """
    if not weights:
        order = np.arange(sum(lengths))
    else:
        shares = _shares(lengths, weights)
        starts = np.cumsum([0, *lengths[:-1]])
        parts = []
        for source, (length, share) in enumerate(zip(lengths, shares, strict=True)):
            places = np.arange(epoch * share, (epoch + 1) * share)
            rounds = [
                _permutation(length, seed, source + 1, int(r)) for r in np.unique(places // length)
            ]
            if len(places):
                items = np.concatenate(rounds)[places - places[0] // length * length]
                parts.append(starts[source] + items)
        order = np.concatenate(parts)
    return order[_permutation(len(order), seed, 0, epoch)]


def check_weights(lengths: Sequence[int], weights: Sequence[float], *, field: str) -> None:
    """Raise InputError for wrong weights, or for one so small that its source never comes.

    Args:
      field: the user's name for them.
    """
    if not weights:
        return
    if len(weights) != len(lengths) or min(weights) <= 0:
        raise errors.InputError(
            f"{field} must be empty or hold one positive number for each of the {len(lengths)} "
            f"sources, got {tuple(weights)}"
        )
    shares = _shares(lengths, weights)
    if min(shares) == 0:
        raise errors.InputError(
            f"{field} must give every source a row of the {sum(lengths)} of an epoch, "
            f"got {tuple(weights)}, which are {shares.tolist()} rows"
        )


def _shares(lengths: Sequence[int], weights: Sequence[float]) -> np.ndarray:
    """Return int[sources]: the places that each has in an epoch."""
    bounds = np.round(np.cumsum([0.0, *weights]) / sum(weights) * sum(lengths))
    return np.diff(bounds).astype(int)


def _permutation(length: int, seed: int | None, stream: int, number: int) -> np.ndarray:
    if seed is None:
        return np.arange(length)
    return np.random.default_rng([seed, stream, number]).permutation(length)


class Plan:
    """The rows of any step; an epoch is planned when it is first needed."""

    def __init__(
        self,
        sizes: np.ndarray,
        lengths: Sequence[int],
        weights: Sequence[float],
        *,
        limits: Limits,
        step_rows: int,
        num_open_rows: int,
        seed: int | None,
    ):
        """Take sizes (int[examples, 3]) of all examples; see `best_fit` and `epoch_order`.

        Raises:
          InputError: see `check_weights`.
        """
        check_weights(lengths, weights, field="config.data.weights")
        self._sizes = sizes
        self._lengths = list(lengths)
        self._weights = list(weights)
        self._limits = limits
        self._step_rows = step_rows
        self._num_open_rows = num_open_rows
        self._seed = seed
        self._first_steps = [0]  # of each planned epoch, and of the next one
        self._epochs: dict[int, list[Row]] = {}
        self._lock = threading.Lock()

    def num_steps(self, num_epochs: int) -> int:
        """Return the number of steps of `num_epochs` epochs."""
        with self._lock:
            while len(self._first_steps) <= num_epochs:
                self._rows_of(len(self._first_steps) - 1)
            return self._first_steps[num_epochs]

    def step(self, step: int) -> list[Row]:
        """Return the rows of a step; at the end of an epoch some are empty."""
        with self._lock:
            while self._first_steps[-1] <= step:
                self._rows_of(len(self._first_steps) - 1)
            epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
            rows = self._rows_of(epoch)
            first = (step - self._first_steps[epoch]) * self._step_rows
        chosen = rows[first : first + self._step_rows]
        return chosen + [()] * (self._step_rows - len(chosen))

    def _rows_of(self, epoch: int) -> list[Row]:
        """Return the rows of an epoch; the last two that were planned are remembered."""
        if epoch not in self._epochs:
            order = epoch_order(self._lengths, self._weights, seed=self._seed, epoch=epoch)
            rows = best_fit(self._sizes, order, self._limits, num_open_rows=self._num_open_rows)
            self._epochs[epoch] = rows
            if epoch + 1 == len(self._first_steps):
                steps = -(-len(rows) // self._step_rows)
                self._first_steps.append(self._first_steps[-1] + steps)
            if len(self._epochs) > 2:
                del self._epochs[next(iter(self._epochs))]
        return self._epochs[epoch]
