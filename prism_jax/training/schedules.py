"""Learning rates by step."""

import math

import optax

from prism_jax import errors
from prism_jax.training import optim


def learning_rate_schedule(
    kind: str,
    *,
    peak: float,
    num_steps: int,
    warmup_steps: int | None,
    warmup_fraction: float | None,
    end_factor: float,
) -> optim.Schedule:
    """Return the learning rate as a function of the step: a rise from 0, then `kind`.

    Step s of a warm-up of w steps has peak * s / w, so the very first step of a run with warm-up
    changes nothing, as in the runs this repeats. After the last step the rate stays at its end.

    Args:
      kind: "constant"; "linear" or "cosine" from `peak` down to `end_factor * peak` at num_steps.
      peak: the highest rate.
      num_steps: steps of the run.
      warmup_steps: length of the rise in steps, or None when `warmup_fraction` gives it.
      warmup_fraction: the same as a part of `num_steps`, rounded up; exactly one is not None.
      end_factor: the last rate as a part of `peak`; must be 1 for "constant".

    Source: transformers `optimization.py: get_cosine_schedule_with_warmup`.
    """
    if (warmup_steps is None) == (warmup_fraction is None):
        raise errors.InputError(
            "optim.warmup_steps and optim.warmup_fraction: exactly one must be None, got "
            f"{warmup_steps} and {warmup_fraction}"
        )
    if warmup_steps is None:
        optim._check_range("optim.warmup_fraction", warmup_fraction, 0, 1)
        warmup_steps = math.ceil(num_steps * warmup_fraction)
    if not 0 <= warmup_steps <= num_steps:
        raise errors.InputError(
            f"optim.warmup_steps must be in [0, {num_steps} steps of the run], got {warmup_steps}"
        )
    if kind not in ("constant", "linear", "cosine"):
        raise errors.InputError(
            f"optim.schedule must be 'constant', 'linear' or 'cosine', got {kind!r}"
        )
    if kind == "constant" and end_factor != 1:
        raise errors.InputError(f"optim.end_factor must be 1 for 'constant', got {end_factor}")

    num_left = max(1, num_steps - warmup_steps)
    if kind == "cosine":
        fall = optax.cosine_decay_schedule(peak, num_left, alpha=end_factor)
    else:
        fall = optax.linear_schedule(peak, peak * end_factor, num_left)
    if warmup_steps == 0:
        return fall
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), fall], [warmup_steps]
    )
