"""Statistics of the rows of a group, and the scales by which scores are divided.

Rows are responses; `prompt_id[b]` in [0, num_groups) is the prompt that row b answers.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# The deviation that divides, and what is subtracted:
#
#     group      the group's mean, the group's deviation       as released
#     step       the group's mean, the deviation within groups over the whole step
#     teacher    the teacher's score, the root mean square distance from it over the step
#     none       the group's mean, nothing divides             arXiv 2503.20783 (Dr. GRPO)
#
# With "group" a group whose scores differ by rounding alone gets advantages of 1; the others keep
# the size of the differences. A teacher's score is a baseline that no response changes: the
# gradient's mean is the same, and a prompt far below its teacher moves more.
Kind = Literal["group", "step", "teacher", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """The scale of normalised scores."""

    kind: Kind
    floor: float | None  # least deviation that divides; None: any


def total(values: Array, prompt_id: Array, num_groups: int) -> Array:
    """Return the sum over each row's group, on the rows."""
    return jax.ops.segment_sum(values, prompt_id, num_segments=num_groups)[prompt_id]


def size(prompt_id: Array, num_groups: int) -> Array:
    """Return the rows of each row's group."""
    return total(jnp.ones(prompt_id.shape, jnp.float32), prompt_id, num_groups)


def centre(values: Array, prompt_id: Array, num_groups: int) -> Array:
    """Return x − mean of the group, x itself in a group of one."""
    values = jax.lax.stop_gradient(values)
    rows = size(prompt_id, num_groups)
    # Subtract the group's minimum first: equal scores then give exactly 0. A rounding error would
    # be divided by a standard deviation of the same size.
    lowest = jax.ops.segment_min(values, prompt_id, num_segments=num_groups)[prompt_id]
    above = values - lowest
    centred = above - total(above, prompt_id, num_groups) / rows
    return jnp.where(rows == 1, values, centred)


def deviation(centred: Array, prompt_id: Array, num_groups: int) -> Array:
    """Return the standard deviation (ddof = 1) of each row's group, 1 in a group of one."""
    rows = size(prompt_id, num_groups)
    variance = total(jnp.square(centred), prompt_id, num_groups) / jnp.maximum(rows - 1.0, 1.0)
    return jnp.where(rows == 1, 1.0, jnp.sqrt(variance))


def scaled(
    values: Float[Array, "B"],
    is_valid: Bool[Array, "B"],
    prompt_id: Int[Array, "B"],
    teacher: Float[Array, "B"] | None,
    *,
    num_groups: int,
    eps: float,
    scale: Scale,
) -> Float[Array, "B"]:
    """Return (x − baseline) / (deviation + eps), see `Kind`.

    Deviations of the step are of valid rows alone: an invalid score is made up, below the lowest.
    The deviation within groups has ddof = the number of groups with a valid row; a step with one
    valid row to each prompt has the deviation 1, as a group of one.

    Args:
      teacher: score of the teacher to each row's prompt; read by the kind "teacher" alone.
    """
    centred = centre(values, prompt_id, num_groups)
    if scale.kind == "none":
        return centred
    if scale.kind == "group":
        spread = deviation(centred, prompt_id, num_groups)
    elif scale.kind == "teacher":
        centred = jax.lax.stop_gradient(values - teacher)
        squares = jnp.where(is_valid, jnp.square(centred), 0.0).sum()
        spread = jnp.sqrt(squares / jnp.maximum(is_valid.sum(dtype=jnp.float32), 1.0))
    else:
        valid = is_valid.astype(jnp.float32)
        rows = total(valid, prompt_id, num_groups)
        mean = total(jnp.where(is_valid, values, 0.0), prompt_id, num_groups) / jnp.maximum(rows, 1)
        squares = jnp.where(is_valid, jnp.square(values - mean), 0.0).sum()
        freedom = jnp.where(is_valid, 1.0 - 1.0 / jnp.maximum(rows, 1.0), 0.0).sum()
        spread = jax.lax.stop_gradient(jnp.sqrt(squares / jnp.maximum(freedom, 1.0)))
        spread = jnp.where(freedom == 0, 1.0, spread)
    if scale.floor is not None:
        spread = jnp.maximum(spread, scale.floor)
    return centred / (spread + eps)
