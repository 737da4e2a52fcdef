"""Typed reducers: each metric knows how to merge its values of two microbatches, hosts or steps.

A metric is a pytree of scalars, so it passes through jit and scan. A metric that counted nothing
has no value: `read` leaves it out, so it is absent from the log instead of appearing as 0 or 1.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """An average total / weight; both are sums, so a merge does not depend on the split."""

    total: jax.Array  # float32[]  sum of the counted values
    weight: jax.Array  # float32[]  number of counted values

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array) -> "Mean":
        """Count `values` where `mask` is True; the two broadcast to one shape."""
        values, mask = jnp.broadcast_arrays(values, mask)
        total = jnp.where(mask, values.astype(jnp.float32), 0.0).sum()
        return cls(total=total, weight=mask.sum(dtype=jnp.float32))

    def merge(self, other: "Mean") -> "Mean":
        """Add the totals and the weights."""
        return Mean(total=self.total + other.total, weight=self.weight + other.weight)

    @property
    def value(self) -> jax.Array:
        """Return total / weight; NaN when nothing was counted."""
        return self.total / self.weight

    def exists(self) -> bool:
        """Return, on the host, whether anything was counted."""
        return float(self.weight) != 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum:
    """A total of a countable quantity, such as tokens or dropped rows; over nothing it is 0."""

    value: jax.Array  # float32[]

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array) -> "Sum":
        """Add `values` where `mask` is True; the two broadcast to one shape."""
        values, mask = jnp.broadcast_arrays(values, mask)
        return cls(value=jnp.where(mask, values.astype(jnp.float32), 0.0).sum())

    def merge(self, other: "Sum") -> "Sum":
        """Add the totals."""
        return Sum(value=self.value + other.value)

    def exists(self) -> bool:
        """Return True: a sum over nothing is 0."""
        return True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Max:
    """The largest value; -inf if there was none."""

    value: jax.Array  # float32[]

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array) -> "Max":
        """Take the largest of `values` where `mask` is True; the two broadcast to one shape."""
        values, mask = jnp.broadcast_arrays(values, mask)
        return cls(value=jnp.where(mask, values.astype(jnp.float32), -jnp.inf).max())

    def merge(self, other: "Max") -> "Max":
        """Keep the larger value."""
        return Max(value=jnp.maximum(self.value, other.value))

    def exists(self) -> bool:
        """Return, on the host, whether there was any value."""
        return float(self.value) != -math.inf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Min:
    """The smallest value; +inf if there was none."""

    value: jax.Array  # float32[]

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array) -> "Min":
        """Take the smallest of `values` where `mask` is True; the two broadcast to one shape."""
        values, mask = jnp.broadcast_arrays(values, mask)
        return cls(value=jnp.where(mask, values.astype(jnp.float32), jnp.inf).min())

    def merge(self, other: "Min") -> "Min":
        """Keep the smaller value."""
        return Min(value=jnp.minimum(self.value, other.value))

    def exists(self) -> bool:
        """Return, on the host, whether there was any value."""
        return float(self.value) != math.inf


Reducer = Mean | Sum | Max | Min
Metrics = dict[str, Reducer]


def read(metrics: Metrics) -> dict[str, float]:
    """Return the existing values as host numbers, in the order of `metrics`."""
    return {name: float(metric.value) for name, metric in metrics.items() if metric.exists()}


def mean(values: Sequence[float] | np.ndarray) -> Mean:
    """Return the mean of values on the host; without values it does not exist."""
    values = np.asarray(values, np.float32)
    return Mean(total=np.float32(values.sum()), weight=np.float32(values.size))
