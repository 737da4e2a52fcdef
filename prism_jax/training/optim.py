"""Optimizers with groups by regular expression, a schedule, clipping, no step on bad gradients.

Parameters are named by their path in the model, "text/layers/q/kernel". A group is a pair
(regular expression, learning-rate factor); the factor None freezes: such parameters have neither
gradients nor optimizer state. `training.optim_kinds` holds the kinds of optimizers.

States are kept apart for each stack of layers, so that a step can walk over the layers: stacked on
the device, or as a state for each layer in the host's memory (see `training.optimizer_step`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from prism_jax import errors, tree_paths
from prism_jax.training import optim_groups, optim_kinds

Tree = Any
Schedule = Callable[[jax.Array], jax.Array]
Memory = Literal["device", "host"]
Rounding = Literal["nearest", "stochastic"]

PLAIN = "plain"  # the states of parameters that are not stacked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OptState:
    """The states of the optimizer and the counts of updates that were not taken."""

    # By stack, "plain" or "layers_36". The state of a stack has the layers in front of every array
    # or, in the host's memory, is a list of one state a layer.
    inner: dict[str, Any]
    num_skipped: jax.Array  # int32[]  updates skipped since the start: loss or gradient not finite
    num_skipped_in_row: jax.Array  # int32[]  of these, the ones since the last update taken


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """Metrics of one optimizer step; every field is a float32 or bool scalar on the device."""

    learning_rate: jax.Array  # of the group with factor 1
    grad_norm: jax.Array  # global norm before clipping
    is_clipped: jax.Array
    is_taken: jax.Array  # False: parameters and moments are as before
    is_empty: jax.Array  # not taken because there was nothing to learn, all being finite
    grad_scale: jax.Array  # factor of the gradients, from clipping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer of the trainable parameters; see `make`."""

    transformation: optim_kinds.Transformation
    numbers: optim_kinds.Numbers
    schedule: Schedule
    clip_norm: float | None
    factors: Mapping[str, float | None]  # learning-rate factor of each parameter; None: frozen
    decays: Mapping[str, float]  # weight decay of each trainable parameter
    stacks: Mapping[str, tuple[str, ...]]  # names of the trainable parameters of each stack
    num_layers: Mapping[str, int]  # of each stack but "plain"
    rounding: Rounding
    memory: Memory

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """Split the parameters into (trainable, frozen); `nnx.merge` takes both."""
        flat = list(nnx.to_flat_state(params))
        names = {tree_paths.path_name(path) for path, _ in flat}
        if names != set(self.factors):
            raise ValueError(
                "the optimizer was made for other parameters; they differ in "
                f"{optim_groups.some(sorted(names ^ set(self.factors)))}"
            )
        trainable = [(p, v) for p, v in flat if self.factors[tree_paths.path_name(p)] is not None]
        frozen = [(p, v) for p, v in flat if self.factors[tree_paths.path_name(p)] is None]
        return nnx.from_flat_state(trainable), nnx.from_flat_state(frozen)

    def init(self, trainable: nnx.State) -> OptState:
        """Return the states before the first step, in their own dtypes."""
        arrays = arrays_of(trainable)
        inner = {}
        for stack, names in self.stacks.items():
            part = {name: arrays[name] for name in names}
            if stack == PLAIN:
                inner[stack] = self.first_state(part)
            elif self.memory == "device":
                inner[stack] = jax.vmap(self.first_state)(part)
            else:
                layers = range(self.num_layers[stack])
                inner[stack] = [
                    self.first_state(jax.tree.map(lambda x, i=i: x[i], part)) for i in layers
                ]
        zero = jnp.zeros((), jnp.int32)
        return OptState(inner=inner, num_skipped=zero, num_skipped_in_row=zero)

    def first_state(self, params: optim_kinds.Arrays) -> Tree:
        """Return the state of one layer, or of parameters outside of stacks, before any step."""
        return self._stored(self.transformation.init(_cast(params, jnp.float32)))

    def measure(
        self, grads: nnx.State, *, step: jax.Array, is_finite: jax.Array, is_empty: jax.Array
    ) -> Update:
        """Return the norm of the gradients, and whether and how the step is taken.

        Args:
          step: int32[], where in the schedule this step is.
          is_finite: bool[], False when the loss is not finite.
          is_empty: bool[], True when there is nothing to learn.
        """
        grad_norm = optax.global_norm(_cast(grads, jnp.float32))
        is_finite = is_finite & jnp.isfinite(grad_norm)
        is_empty = is_finite & is_empty
        is_clipped = jnp.zeros((), bool)
        grad_scale = jnp.ones(())
        if self.clip_norm is not None:
            is_clipped = grad_norm > self.clip_norm
            # A factor instead of `optax.clip_by_global_norm`: gradients are read stack by stack.
            grad_scale = jnp.where(is_clipped, self.clip_norm / grad_norm, 1.0)
        return Update(
            learning_rate=jnp.asarray(self.schedule(step), jnp.float32),
            grad_norm=grad_norm,
            is_clipped=is_clipped,
            is_taken=is_finite & ~is_empty,
            is_empty=is_empty,
            grad_scale=grad_scale,
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
        key: jax.Array | None,
    ) -> tuple[nnx.State, OptState, Update]:
        """Take one step, or none where `is_finite`, the gradients' norm or `is_empty` says so.

        All arithmetic is float32; parameters and moments are stored in their own dtypes. A step
        that is not taken leaves parameters, moments and Adam's count bit-equal, for any number of
        steps in a row. Steps that are not finite are counted, and the caller stops the run
        (`num_skipped_in_row`); empty ones leave these counts as they are. States are on the device.

        Args:
          grads: the gradients, in the structure of `trainable`.
          opt_state: from `init` or the last `update`.
          trainable: the parameters to change.
          step: int32[], where in the schedule this step is.
          is_finite: bool[], False when the loss is not finite.
          is_empty: bool[], True when there is nothing to learn: without it, momentum and weight
            decay would move the parameters.
          key: of stochastic rounding; None where there is none.
        """
        update = self.measure(grads, step=step, is_finite=is_finite, is_empty=is_empty)
        grads, values = arrays_of(grads), arrays_of(trainable)
        inner, moved = {}, {}
        for number, (stack, names) in enumerate(self.stacks.items()):
            both = [{name: tree[name] for name in names} for tree in (grads, values)]
            stack_key = None if key is None else jax.random.fold_in(key, number)
            walk = self.advance if stack == PLAIN else functools.partial(self._walk, stack)
            values_of, inner[stack] = walk(*both, opt_state.inner[stack], stack_key, update=update)
            moved |= values_of
        return with_arrays(trainable, moved), counted(opt_state, inner, update), update

    def _walk(
        self,
        stack: str,
        grads: optim_kinds.Arrays,
        params: optim_kinds.Arrays,
        state: Tree,
        key: jax.Array | None,
        *,
        update: Update,
    ) -> tuple[optim_kinds.Arrays, Tree]:
        """Move a stack of layers, each by itself."""
        numbers = jnp.arange(self.num_layers[stack])
        one = functools.partial(self.advance, update=update)
        # The sizes of blocks are read twice: of a whole stack, moments would be held in float32.
        if self.transformation.is_elementwise and not self.numbers.has_blocks:
            keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
            return jax.vmap(one)(grads, params, state, keys)

        def layer(number: jax.Array, moved: tuple) -> tuple:
            layer_grads, old = jax.tree.map(lambda x: x[number], (grads, moved))
            layer_key = None if key is None else jax.random.fold_in(key, number)
            # A branch is fused with nothing around it: the layer is read whole before any of it is
            # written, so that the stack is changed in place.
            new = jax.lax.cond(
                update.is_taken, lambda old: one(layer_grads, *old, layer_key), lambda old: old, old
            )
            return jax.tree.map(lambda x, y: x.at[number].set(y), moved, new)

        return jax.lax.fori_loop(0, len(numbers), layer, (params, state))

    def advance(
        self,
        grads: optim_kinds.Arrays,
        params: optim_kinds.Arrays,
        state: Tree,
        key: jax.Array | None,
        *,
        update: Update,
    ) -> tuple[optim_kinds.Arrays, Tree]:
        """Move the parameters of one layer, or those that are not stacked, as `update` says."""
        grads = {n: g.astype(jnp.float32) * update.grad_scale for n, g in grads.items()}
        full = {n: p.astype(jnp.float32) for n, p in params.items()}
        wide = optim_kinds.widened(state)
        directions, new = self.transformation.update(grads, wide, full)
        new = jax.tree.map(lambda x, y: jnp.where(update.is_taken, x, y), new, wide)
        keys = (None, None) if key is None else jax.random.split(key)
        stored = self._stored(new, keys[0])
        if self.numbers.has_blocks:
            # Codes of codes may differ, and a direction needs more bits than they have.
            stored = jax.tree.map(lambda x, y: jnp.where(update.is_taken, x, y), stored, state)
        elif self.transformation.direction is not None:
            # From the stored state: a second computation from the old moments would keep a copy of
            # them until the parameters are written. On CUDA one kernel writes moments and
            # parameters, which a barrier would read and write once more.
            stored = jax.lax.platform_dependent(
                stored, cuda=lambda state: state, default=jax.lax.optimization_barrier
            )
            directions = self.transformation.direction(optim_kinds.widened(stored))
        moved = {}
        for number, (name, old) in enumerate(full.items()):
            rate = update.learning_rate * self.factors[name]
            direction = directions[name]
            # Without decay there is no such term: XLA would keep its zeros in memory, in one array
            # with those that the gradients start from.
            if self.decays[name]:
                direction = direction + self.decays[name] * old
            value = old - rate * direction
            value = jnp.where(update.is_taken, value, old)
            value_key = self._rounding_key(keys[1], number)
            moved[name] = optim_kinds.rounded(value, params[name].dtype, value_key)
        return moved, stored

    def _stored(self, state: Tree, key: jax.Array | None = None) -> Tree:
        """Return a state as it is kept."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        return structure.unflatten(
            optim_kinds.stored(path, leaf, self.numbers, self._rounding_key(key, number))
            for number, (path, leaf) in enumerate(leaves)
        )

    def _rounding_key(self, key: jax.Array | None, number: int) -> jax.Array | None:
        """Return the key with which an array is rounded; None: to the nearest."""
        is_nearest = key is None or self.rounding == "nearest"
        return None if is_nearest else jax.random.fold_in(key, number)


def arrays_of(tree: nnx.State) -> optim_kinds.Arrays:
    """Return the arrays of a state by the names of their paths."""
    return {name: variable.get_value() for name, variable in tree_paths.variables(tree).items()}


def with_arrays(tree: nnx.State, arrays: optim_kinds.Arrays) -> nnx.State:
    """Return the state with other arrays, its metadata kept."""
    flat = nnx.to_flat_state(tree)
    return nnx.from_flat_state(
        [(path, v.replace(arrays[tree_paths.path_name(path)])) for path, v in flat]
    )


def counted(opt_state: OptState, inner: dict[str, Any], update: Update) -> OptState:
    """Return the states after a step, those that were not finite counted."""
    skipped = 1 - (update.is_taken | update.is_empty).astype(jnp.int32)
    in_row = (opt_state.num_skipped_in_row + skipped) * skipped
    return OptState(
        inner=inner,
        num_skipped=opt_state.num_skipped + skipped,
        num_skipped_in_row=jnp.where(update.is_empty, opt_state.num_skipped_in_row, in_row),
    )


def make(
    params: nnx.State,
    *,
    kind: optim_kinds.Kind,
    numbers: optim_kinds.Numbers,
    schedule: Schedule,
    weight_decay: float,
    no_decay: Sequence[str],
    groups: Sequence[optim_groups.Group],
    clip_norm: float | None,
    rounding: Rounding,
    memory: Memory,
) -> Optimizer:
    """Make an optimizer for these parameters; decay is apart from the direction, as in AdamW.

    Args:
      params: the parameters, abstract ones are enough.
      kind: see `training.optim_kinds`.
      numbers: of the kind.
      schedule: learning rate by step, see `learning_rate_schedule`.
      weight_decay: factor of every parameter but those of `no_decay`.
      no_decay: regular expressions of whole paths that are not decayed.
      groups: (regular expression of whole paths, learning-rate factor or None for frozen), the
        first that matches decides. Each must decide something, each parameter must be decided.
      clip_norm: largest global norm of the gradients; None for no clipping.
      rounding: of parameters and moments that are kept in bfloat16.
      memory: where the states of stacked layers are kept between steps.

    Raises:
      InputError: a pattern is malformed or matches nothing, or a parameter is in no group.
    """
    if not weight_decay >= 0:
        raise errors.InputError(f"optim.weight_decay must be >= 0, got {weight_decay}")
    if clip_norm is not None and not clip_norm > 0:
        raise errors.InputError(f"optim.clip_norm must be > 0 or None, got {clip_norm}")
    variables = tree_paths.variables(params)
    factors = optim_groups.assign(list(variables), groups)
    free = optim_groups.matching(list(variables), no_decay, place="optim.no_decay")
    trainable = {name: v for name, v in variables.items() if factors[name] is not None}
    stacks: dict[str, list[str]] = {}
    num_layers: dict[str, int] = {}
    axes: dict[str, tuple[str | None, ...]] = {}
    for name, variable in trainable.items():
        axes[name] = tuple(variable.get_metadata().get("axes", (None,) * variable.ndim))
        stack = PLAIN
        if axes[name][:1] == ("layers",):
            stack, axes[name] = f"layers_{variable.shape[0]}", axes[name][1:]
            num_layers[stack] = variable.shape[0]
        stacks.setdefault(stack, []).append(name)
    return Optimizer(
        transformation=optim_kinds.make(kind, numbers, axes),
        numbers=numbers,
        schedule=schedule,
        clip_norm=clip_norm,
        factors=factors,
        decays={name: 0.0 if name in free else weight_decay for name in trainable},
        stacks={stack: tuple(names) for stack, names in stacks.items()},
        num_layers=num_layers,
        rounding=rounding,
        memory=memory,
    )


def _check_range(place: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise errors.InputError(f"{place} must be in [{low}, {high}), got {value}")


def _cast(tree: Tree, dtype: jnp.dtype) -> Tree:
    return jax.tree.map(lambda x: x.astype(dtype), tree)
