"""The state of training {step, params, opt_state}: built abstractly first, then in its shards."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prism_jax import tree_paths
from prism_jax.training import eight_bit, optim

Tree = Any
MakeModel = Callable[[nnx.Rngs], nnx.Module]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state that an optimizer step changes; the graph definition is static and kept outside."""

    step: jax.Array  # int32[]  steps taken, skipped updates included
    params: nnx.State  # all parameters, trainable and frozen, as nnx.Param with their `axes`
    opt_state: optim.OptState  # of the trainable parameters alone


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State]:
    """Split a model into its static graph and its parameters, each with its metadata.

    Raises:
      ValueError: the model holds state other than parameters (random streams, batch statistics):
        it would be neither trained nor saved.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    names = [f"{name} ({type(v).__name__})" for name, v in tree_paths.variables(rest).items()]
    if names:
        raise ValueError(
            f"the model must hold nothing but parameters; it also holds {', '.join(names)}"
        )
    return graphdef, params


def abstract_params(
    make_model: MakeModel, *, param_dtype: jnp.dtype | None
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the static graph and the parameters as shapes, allocating nothing.

    Floating parameters take `param_dtype`, the dtype of the master weights (None: as the model
    makes them).
    """
    model = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
    graphdef, params = split_model(model)
    return graphdef, jax.eval_shape(lambda p: _cast_floating(p, param_dtype), params)


def abstract_state(params: nnx.State, optimizer: optim.Optimizer) -> TrainState:
    """Return the whole state as shapes; the metadata of the parameters (`axes`) is kept."""
    return jax.eval_shape(lambda p: _state_of(p, optimizer), params)


def shardings(
    abstract: TrainState,
    *,
    of_params: Callable[[nnx.State], nnx.State],
    replicated: jax.sharding.Sharding,
) -> TrainState:
    """Return the sharding of every leaf: moments lie as their parameters, counts everywhere.

    States of one layer are in the pinned memory of the host, see `training.optimizer_step`.

    Args:
      abstract: from `abstract_state`.
      of_params: parameters with `axes` -> the same with a sharding as each value.
      replicated: of the counts, and of states that are smaller than their parameter but for the
        sizes of blocks, which lie as the codes.
    """
    placed = of_params(abstract.params)
    params, places = (
        {name: variable.get_value() for name, variable in tree_paths.variables(tree).items()}
        for tree in (abstract.params, placed)
    )

    def one(path: tuple, leaf: jax.ShapeDtypeStruct | eight_bit.Blocks) -> Tree:
        if eight_bit.is_blocks(leaf):
            codes = one(path, leaf.codes)
            return eight_bit.Blocks(codes=codes, sizes=_with_whole_last_axis(codes))
        is_layer = isinstance(abstract.opt_state.inner[path[0].key], list)
        name = next((n for n in _endings(path) if n in params), None)
        place = replicated
        if name is not None and params[name].shape[is_layer:] == leaf.shape:
            place = places[name]
            if is_layer and isinstance(place, jax.sharding.NamedSharding):
                spec = jax.sharding.PartitionSpec(*place.spec[1:])
                place = jax.sharding.NamedSharding(place.mesh, spec)
        return place.with_memory_kind("pinned_host") if is_layer else place

    opt_state = abstract.opt_state
    counts = jax.tree.map(lambda _: replicated, dataclasses.replace(opt_state, inner={}))
    inner = jax.tree_util.tree_map_with_path(one, opt_state.inner, is_leaf=eight_bit.is_blocks)
    return TrainState(
        step=replicated, params=placed, opt_state=dataclasses.replace(counts, inner=inner)
    )


def _with_whole_last_axis(place: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Return the sharding of an array whose last axis is shorter, and not split."""
    if not isinstance(place, jax.sharding.NamedSharding):
        return place
    return place.update(spec=jax.sharding.PartitionSpec(*place.spec[:-1]))


def _endings(path: tuple) -> list[str]:
    """Return the names that the end of a path may be, the longest first."""
    parts = tree_paths.path_name(path).split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def with_shardings(abstract: Tree, shardings: Tree) -> Tree:
    """Give every abstract leaf its sharding, so that a restore knows where each leaf goes."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def init(
    make_model: MakeModel,
    optimizer: optim.Optimizer,
    key: jax.Array,
    *,
    param_dtype: jnp.dtype | None,
    shardings: Tree | None,
) -> TrainState:
    """Make the whole state in one compiled call, each leaf created in its own shards.

    Args:
      make_model: builds the model from random streams; called under `jax.jit`.
      optimizer: made from the parameters of `abstract_params` with the same `param_dtype`.
      key: a typed key; equal keys give equal parameters on any mesh.
      param_dtype: dtype of the master weights; None keeps the model's.
      shardings: the structure of `abstract_state` with a sharding at every leaf; None leaves
        everything on the default device.
    """

    def make(key: jax.Array) -> nnx.State:
        return _cast_floating(split_model(make_model(nnx.Rngs(key)))[1], param_dtype)

    if optimizer.memory == "host":
        params = jax.jit(make, out_shardings=None if shardings is None else shardings.params)(key)
        return _with_host_states(params, optimizer, shardings)
    return jax.jit(lambda key: _state_of(make(key), optimizer), out_shardings=shardings)(key)


def from_params(
    params: nnx.State, optimizer: optim.Optimizer, *, shardings: Tree | None
) -> TrainState:
    """Make a state at step 0 around loaded parameters, which are donated: not to be used again."""
    if optimizer.memory == "host":
        return _with_host_states(params, optimizer, shardings)
    make = jax.jit(
        lambda p: _state_of(p, optimizer), out_shardings=shardings, donate_argnames=("p",)
    )
    return make(params)


def _state_of(params: nnx.State, optimizer: optim.Optimizer) -> TrainState:
    trainable, _ = optimizer.split(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(trainable)
    )


def _with_host_states(
    params: nnx.State, optimizer: optim.Optimizer, shardings: TrainState | None
) -> TrainState:
    """Make the states of one layer after the other, so that the device never holds them all."""
    trainable = optimizer.split(params)[0]
    arrays = optim.arrays_of(trainable)
    inner = {}
    for stack, names in optimizer.stacks.items():
        part = {name: arrays[name] for name in names}
        if stack == optim.PLAIN:
            places = None if shardings is None else shardings.opt_state.inner[stack]
            inner[stack] = jax.jit(optimizer.first_state, out_shardings=places)(part)
            continue
        first = jax.jit(lambda tree: optimizer.first_state(jax.tree.map(lambda x: x[0], tree)))
        states = []
        for number in range(optimizer.num_layers[stack]):
            one = first(part)
            places = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), one)
            if shardings is not None:
                places = shardings.opt_state.inner[stack][number]
            states.append(jax.device_put(one, places))
        inner[stack] = states
    zero = jnp.zeros((), jnp.int32)
    if shardings is not None:
        zero = jax.device_put(zero, shardings.step)
    return TrainState(
        step=zero,
        params=params,
        # Separate arrays, because a step donates each.
        opt_state=optim.OptState(
            inner=inner, num_skipped=jnp.copy(zero), num_skipped_in_row=jnp.copy(zero)
        ),
    )


def _cast_floating(params: nnx.State, dtype: jnp.dtype | None) -> nnx.State:
    if dtype is None:
        return params

    def one(variable: nnx.Variable) -> nnx.Variable:
        value = variable[...]
        # Adapters are small, and learn too slowly for few bits.
        if variable.get_metadata().get("is_adapter") or not jnp.issubdtype(
            value.dtype, jnp.floating
        ):
            return variable
        return variable.replace(value.astype(dtype))

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
