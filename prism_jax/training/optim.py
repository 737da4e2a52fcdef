"""AdamW with groups by regular expression, a schedule, clipping, and no step on bad gradients.

Parameters are named by their path in the model, "text/layers/q/kernel". A group is a pair
(regular expression, learning-rate factor); the factor None freezes: such parameters have neither
gradients nor optimiser state.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from prism_jax import errors, tree_paths

Schedule = Callable[[jax.Array], jax.Array]
Group = tuple[str, float | None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OptState:
    """Hold Adam's moments and the counts of updates that were not taken."""

    adam: optax.ScaleByAdamState  # count of updates taken, and both moments
    num_skipped: jax.Array  # int32[]  updates skipped since the start: loss or gradient not finite
    num_skipped_in_row: jax.Array  # int32[]  of these, the ones since the last update taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """Report one optimiser step; every field is a float32 or bool scalar on the device."""

    learning_rate: jax.Array  # of the group with factor 1
    grad_norm: jax.Array  # global norm before clipping
    is_clipped: jax.Array
    is_taken: jax.Array  # False: parameters and moments are as before
    is_empty: jax.Array  # not taken because there was nothing to learn, all being finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Update the trainable parameters; see `adamw`, which makes it."""

    adam: optax.GradientTransformation
    schedule: Schedule
    clip_norm: float | None
    factors: Mapping[str, float | None]  # learning-rate factor of each parameter; None: frozen
    decays: Mapping[str, float]  # weight decay of each trainable parameter
    mu_dtype: jnp.dtype
    nu_dtype: jnp.dtype

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """Split the parameters into (trainable, frozen); `nnx.merge` takes both."""
        flat = list(nnx.to_flat_state(params))
        names = {tree_paths.path_name(path) for path, _ in flat}
        if names != set(self.factors):
            raise ValueError(
                "the optimiser was made for other parameters; they differ in "
                f"{_some(sorted(names ^ set(self.factors)))}"
            )
        trainable = [(p, v) for p, v in flat if self.factors[tree_paths.path_name(p)] is not None]
        frozen = [(p, v) for p, v in flat if self.factors[tree_paths.path_name(p)] is None]
        return nnx.from_flat_state(trainable), nnx.from_flat_state(frozen)

    def init(self, trainable: nnx.State) -> OptState:
        """Return zero moments in their own dtypes, with the metadata of the parameters."""
        adam = self.adam.init(trainable)
        zero = jnp.zeros((), jnp.int32)
        return OptState(
            adam=adam._replace(mu=_cast(adam.mu, self.mu_dtype), nu=_cast(adam.nu, self.nu_dtype)),
            num_skipped=zero,
            num_skipped_in_row=zero,
        )

    def update(
        self,
        grads: nnx.State,
        opt_state: OptState,
        trainable: nnx.State,
        *,
        step: jax.Array,
        is_finite: jax.Array,
        is_empty: jax.Array,
    ) -> tuple[nnx.State, OptState, Update]:
        """Take one step, or none where `is_finite`, the gradients' norm or `is_empty` says so.

        All arithmetic is float32; parameters and moments are stored in their own dtypes. A step
        that is not taken leaves parameters, moments and Adam's count bit-equal, for any number of
        steps in a row. Steps that are not finite are counted, and the caller stops the run
        (`num_skipped_in_row`); empty ones leave these counts as they are.

        Args:
          grads: the gradients, in the structure of `trainable`.
          opt_state: what `init` or the last `update` returned.
          trainable: the parameters to change.
          step: int32[], where in the schedule this step is.
          is_finite: bool[], False when the loss is not finite.
          is_empty: bool[], True when there is nothing to learn: without it, momentum and weight
            decay would move the parameters.
        """
        grads = _cast(grads, jnp.float32)
        grad_norm = optax.global_norm(grads)
        is_finite = is_finite & jnp.isfinite(grad_norm)
        is_empty = is_finite & is_empty
        is_taken = is_finite & ~is_empty
        is_clipped = jnp.zeros((), bool)
        if self.clip_norm is not None:
            is_clipped = grad_norm > self.clip_norm
            scale = jnp.where(is_clipped, self.clip_norm / grad_norm, 1.0)
            grads = jax.tree.map(lambda g: g * scale, grads)
        directions, adam = self.adam.update(grads, opt_state.adam)
        learning_rate = self.schedule(step)

        def move(path, param, direction):
            name = tree_paths.path_name(path)
            full = param.astype(jnp.float32)
            rate = learning_rate * self.factors[name]
            return (full - rate * (direction + self.decays[name] * full)).astype(param.dtype)

        moved = jax.tree_util.tree_map_with_path(move, trainable, directions)
        adam = jax.tree.map(lambda new, old: new.astype(old.dtype), adam, opt_state.adam)

        def keep(new, old):
            return jnp.where(is_taken, new, old)

        skipped = 1 - is_finite.astype(jnp.int32)
        in_row = (opt_state.num_skipped_in_row + skipped) * skipped
        opt_state = OptState(
            adam=jax.tree.map(keep, adam, opt_state.adam),
            num_skipped=opt_state.num_skipped + skipped,
            num_skipped_in_row=jnp.where(is_empty, opt_state.num_skipped_in_row, in_row),
        )
        told = Update(
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            is_clipped=is_clipped,
            is_taken=is_taken,
            is_empty=is_empty,
        )
        return jax.tree.map(keep, moved, trainable), opt_state, told


def adamw(
    params: nnx.State,
    *,
    schedule: Schedule,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    no_decay: Sequence[str],
    groups: Sequence[Group],
    clip_norm: float | None,
    mu_dtype: jnp.dtype,
    nu_dtype: jnp.dtype,
) -> Optimizer:
    """Make AdamW (decay apart from the moments, times the learning rate) for these parameters.

    Args:
      params: the parameters, abstract ones are enough.
      schedule: learning rate by step, see `learning_rate_schedule`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: factor of every parameter but those of `no_decay`.
      no_decay: regular expressions of whole paths that are not decayed.
      groups: (regular expression of whole paths, learning-rate factor or None for frozen), the
        first that matches decides. Each must decide something, each parameter must be decided.
      clip_norm: largest global norm of the gradients; None for no clipping.
      mu_dtype: storage of the first moment.
      nu_dtype: storage of the second moment. bfloat16 stops following the gradients when 1 - b2 is
        below its resolution of 2^-8; float32 does not.

    Raises:
      InputError: a pattern is malformed or matches nothing, or a parameter is in no group.
    """
    _check_range("optim.b1", b1, 0, 1)
    _check_range("optim.b2", b2, 0, 1)
    if not weight_decay >= 0:
        raise errors.InputError(f"optim.weight_decay must be >= 0, got {weight_decay}")
    if clip_norm is not None and not clip_norm > 0:
        raise errors.InputError(f"optim.clip_norm must be > 0 or None, got {clip_norm}")
    names = [tree_paths.path_name(path) for path, _ in nnx.to_flat_state(params)]
    factors = _assign_groups(names, groups)
    free = _matching(names, no_decay, place="optim.no_decay")
    trainable = [name for name in names if factors[name] is not None]
    return Optimizer(
        adam=optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        schedule=schedule,
        clip_norm=clip_norm,
        factors=factors,
        decays={name: 0.0 if name in free else weight_decay for name in trainable},
        mu_dtype=jnp.dtype(mu_dtype),
        nu_dtype=jnp.dtype(nu_dtype),
    )


def learning_rate_schedule(
    kind: str,
    *,
    peak: float,
    num_steps: int,
    warmup_steps: int | None,
    warmup_fraction: float | None,
    end_factor: float,
) -> Schedule:
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
        _check_range("optim.warmup_fraction", warmup_fraction, 0, 1)
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

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(step / max(1, warmup_steps), 1.0) if warmup_steps else 1.0
        done = jnp.clip((step - warmup_steps) / max(1, num_steps - warmup_steps), 0.0, 1.0)
        if kind == "cosine":
            left = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        else:
            left = 1.0 - done
        fall = end_factor + (1.0 - end_factor) * left
        return peak * rise * fall

    return schedule


def _assign_groups(names: Sequence[str], groups: Sequence[Group]) -> dict[str, float | None]:
    factors: dict[str, float | None] = {}
    for pattern, factor in groups:
        if factor is not None and not factor > 0:
            raise errors.InputError(
                f"optim.groups: the factor of {pattern!r} must be > 0, or None for frozen; "
                f"got {factor}"
            )
        matched = _matching(names, [pattern], place="optim.groups")
        won = matched - set(factors)
        if not won:
            raise errors.InputError(
                f"optim.groups: {pattern!r} decides nothing, earlier groups took all it matches"
            )
        factors |= dict.fromkeys(won, factor)
    missed = [name for name in names if name not in factors]
    if missed:
        raise errors.InputError(f"optim.groups: no group matches {_some(missed)}")
    if all(factor is None for factor in factors.values()):
        raise errors.InputError("optim.groups: every parameter is frozen, nothing to train")
    return factors


def _matching(names: Sequence[str], patterns: Sequence[str], *, place: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise errors.InputError(
                f"{place}: {pattern!r} is not a regular expression: {error}"
            ) from error
        matched = {name for name in names if regex.fullmatch(name)}
        if not matched:
            raise errors.InputError(
                f"{place}: {pattern!r} matches no parameter; there are {_some(names)}"
            )
        found |= matched
    return found


def _check_range(place: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise errors.InputError(f"{place} must be in [{low}, {high}), got {value}")


def _cast(tree: nnx.State, dtype: jnp.dtype) -> nnx.State:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def _some(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
