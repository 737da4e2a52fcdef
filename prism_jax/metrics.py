"""Typed reducers: a metric knows how two microbatches, hosts or steps of it are put together.

A metric is a pytree of scalars, so it passes through jit and scan. What was never counted has no
value: `read` leaves it out, so that it is absent from a log instead of standing there as 0 or 1.
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
    """Average total / weight; both are sums, so a merge is independent of any split."""

    total: jax.Array  # float32[]  sum of what was counted
    weight: jax.Array  # float32[]  how much was counted

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
        """Say, on the host, whether anything was counted."""
        return float(self.weight) != 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum:
    """Total of a countable quantity, such as tokens or dropped rows; over nothing it is 0."""

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
    """Largest value; -inf stands for nothing seen."""

    value: jax.Array  # float32[]

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array) -> "Max":
        """Take the largest of `values` where `mask` is True; the two broadcast to one shape."""
        values, mask = jnp.broadcast_arrays(values, mask)
        return cls(value=jnp.where(mask, values.astype(jnp.float32), -jnp.inf).max())

    def merge(self, other: "Max") -> "Max":
        """Keep the larger one."""
        return Max(value=jnp.maximum(self.value, other.value))

    def exists(self) -> bool:
        """Say, on the host, whether anything was seen."""
        return float(self.value) != -math.inf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Min:
    """Smallest value; +inf stands for nothing seen."""

    value: jax.Array  # float32[]

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array) -> "Min":
        """Take the smallest of `values` where `mask` is True; the two broadcast to one shape."""
        values, mask = jnp.broadcast_arrays(values, mask)
        return cls(value=jnp.where(mask, values.astype(jnp.float32), jnp.inf).min())

    def merge(self, other: "Min") -> "Min":
        """Keep the smaller one."""
        return Min(value=jnp.minimum(self.value, other.value))

    def exists(self) -> bool:
        """Say, on the host, whether anything was seen."""
        return float(self.value) != math.inf


Reducer = Mean | Sum | Max | Min
Metrics = dict[str, Reducer]


def read(metrics: Metrics) -> dict[str, float]:
    """Return the values that exist as host numbers, in the order of `metrics`."""
    return {name: float(metric.value) for name, metric in metrics.items() if metric.exists()}


def mean(values: Sequence[float] | np.ndarray) -> Mean:
    """Return the mean of values on the host; of no value it does not exist."""
    values = np.asarray(values, np.float32)
    return Mean(total=np.float32(values.sum()), weight=np.float32(values.size))
