"""The state of training {step, params, opt_state}: built abstractly first, then in its shards."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prism_jax import tree_paths
from prism_jax.training import optim

Tree = Any
MakeModel = Callable[[nnx.Rngs], nnx.Module]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Hold what one optimiser step changes; the graph definition is static and kept outside."""

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
    """Return the whole state as shapes; Param metadata (`axes`) is kept, moments included."""
    return jax.eval_shape(lambda p: _state_of(p, optimizer), params)


def shardings(
    abstract: TrainState,
    *,
    of_params: Callable[[nnx.State], nnx.State],
    replicated: jax.sharding.Sharding,
) -> TrainState:
    """Return the sharding of every leaf: moments lie as their parameters, counts everywhere.

    Args:
      abstract: from `abstract_state`.
      of_params: parameters with `axes` -> the same with a sharding as each value; also called for
        the moments, which have the axes of their parameters.
      replicated: of the counts.
    """
    adam = abstract.opt_state.adam
    counts = jax.tree.map(lambda _: replicated, abstract.opt_state)
    moments = adam._replace(count=replicated, mu=of_params(adam.mu), nu=of_params(adam.nu))
    return TrainState(
        step=replicated,
        params=of_params(abstract.params),
        opt_state=dataclasses.replace(counts, adam=moments),
    )


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
      param_dtype: dtype of the master weights; None keeps the model's own.
      shardings: the structure of `abstract_state` with a sharding at every leaf; None leaves
        everything on the default device.
    """

    def make(key: jax.Array) -> TrainState:
        _, params = split_model(make_model(nnx.Rngs(key)))
        return _state_of(_cast_floating(params, param_dtype), optimizer)

    return jax.jit(make, out_shardings=shardings)(key)


def from_params(
    params: nnx.State, optimizer: optim.Optimizer, *, shardings: Tree | None
) -> TrainState:
    """Make a state at step 0 around loaded parameters, which are donated: not to be used again."""
    make = jax.jit(
        lambda p: _state_of(p, optimizer), out_shardings=shardings, donate_argnames=("p",)
    )
    return make(params)


def _state_of(params: nnx.State, optimizer: optim.Optimizer) -> TrainState:
    trainable, _ = optimizer.split(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(trainable)
    )


def _cast_floating(params: nnx.State, dtype: jnp.dtype | None) -> nnx.State:
    if dtype is None:
        return params
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
    )
