"""Loss terms as `Sum(total, weight)`, and the aggregations of token losses.

No loss divides by a count of its microbatch. A loss returns sums; the train step computes the
whole batch's weights from the masks before its scan over microbatches (`weight`) and adds
total / whole-batch weight for every microbatch, so any split of a batch gives the same step.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum:
    """A term of an objective: total / weight, after both are summed over microbatches."""

    total: Any  # float32[]  has the gradient
    weight: Any  # float32[]  depends on masks only, never on parameters

    @property
    def value(self) -> Float[Array, ""]:
        """Return total / weight, and 0 with a gradient of 0 when the weight is 0."""
        is_empty = self.weight == 0
        return jnp.where(is_empty, 0.0, self.total / jnp.where(is_empty, 1.0, self.weight))


def weight(
    mask: Bool[Array, "*B T"], *, aggregation: Aggregation, norm_tokens: int | None
) -> Float[Array, ""]:
    """Return the denominator of `aggregate` for these rows; additive over rows.

    A row whose tokens are all masked (padding, a filtered overlong response) is not counted.
    """
    if aggregation not in Aggregation.__args__:
        raise ValueError(f"aggregation must be one of {Aggregation.__args__}, got {aggregation!r}")
    if (aggregation == "seq-mean-token-sum-norm") != (norm_tokens is not None):
        raise ValueError(
            "norm_tokens must be given for the aggregation seq-mean-token-sum-norm and be None "
            f"for any other, got {norm_tokens} with {aggregation}"
        )
    if aggregation == "token-mean":
        return mask.sum(dtype=jnp.float32)
    num_rows = mask.any(-1).sum(dtype=jnp.float32)
    return num_rows if norm_tokens is None else num_rows * norm_tokens


def aggregate(
    losses: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    aggregation: Aggregation,
    norm_tokens: int | None,
) -> Sum:
    """Aggregate token losses l[b, t] over the n_b unmasked tokens of each row b.

    token-mean               Σ_b Σ_t l / Σ_b n_b
    seq-mean-token-mean      Σ_b (Σ_t l / n_b) / rows
    seq-mean-token-sum       Σ_b Σ_t l / rows
    seq-mean-token-sum-norm  Σ_b Σ_t l / (rows · norm_tokens), a constant length (Dr.GRPO)

    rows counts the rows with n_b > 0. `norm_tokens` is for the last aggregation alone, and None for
    the others. The released form of the last divides by the padded length, not by the rows.
    Source: PRISM verl/verl/trainer/ppo/core_algos.py:955.
    """
    masked_losses = jnp.where(mask, losses, 0.0)
    if aggregation == "seq-mean-token-mean":
        num_tokens = mask.sum(-1, dtype=jnp.float32)
        total = (masked_losses.sum(-1) / jnp.maximum(num_tokens, 1.0)).sum()
    else:
        total = masked_losses.sum()
    return Sum(total=total, weight=weight(mask, aggregation=aggregation, norm_tokens=norm_tokens))
