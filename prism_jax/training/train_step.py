"""One optimiser step as a pure jitted function, the same for any split into microbatches.

A loss returns sums, never means. Their weights over the whole batch are computed from the masks
before the first microbatch runs, so each microbatch adds its exact share of the gradient:

  loss = sum over terms k of  coefficient_k * total_k(whole batch) / weight_k(whole batch)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prism_jax import metrics
from prism_jax.losses import reduce
from prism_jax.training import optim, train_state

Tree = Any
Terms = dict[str, reduce.Sum]
LossFn = Callable[[nnx.Module, Tree, jax.Array], tuple[Terms, metrics.Metrics]]
WeightsFn = Callable[[Tree], dict[str, jax.Array]]
TrainStep = Callable[
    [train_state.TrainState, Tree, jax.Array], tuple[train_state.TrainState, metrics.Metrics]
]


def make_train_step(
    graphdef: nnx.GraphDef,
    loss_fn: LossFn,
    optimizer: optim.Optimizer,
    *,
    weights_fn: WeightsFn,
    coefficients: Mapping[str, float],
    num_microbatches: int,
    shardings: Tree | None,
    compiler_options: Mapping[str, bool | int | str] | None = None,
) -> TrainStep:
    """Return the jitted `(state, batch, key) -> (state, metrics)`; it donates the state.

    A step whose loss or gradient is not finite changes nothing but `step` and the counts of
    skipped updates, which the metrics `optim/skipped_updates` and `optim/skipped_in_row` show. Nor
    does a step without anything to learn, in which each term with a coefficient has the weight 0:
    `optim/empty_updates` is then 1.

    Args:
      graphdef: static structure of the model, from `training.train_state.abstract_params`.
      loss_fn: (model, microbatch, key) -> (terms, metrics); the key differs for each microbatch.
      optimizer: made for the same parameters; decides which of them are differentiated.
      weights_fn: the whole batch, [M, rows, ...] -> the weight of each term over all of it. A
        term of weight 0 adds 0.
      coefficients: factor of each term in the loss; its keys are exactly the terms.
      num_microbatches: M, the leading size of every leaf of a batch (`split_rows` makes it).
      shardings: of the state, so that it never changes its layout; None for one device.
      compiler_options: of XLA, by their names without `--`; None leaves its own.
    """

    def step(state, batch, key):
        _check_leading_size(batch, num_microbatches)
        weights = weights_fn(batch)
        _check_names("weights_fn", weights, coefficients)
        trainable, frozen = optimizer.split(state.params)
        layout = None if shardings is None else optimizer.split(shardings.params)[0]

        def loss_of(trainable, microbatch, key):
            model = nnx.merge(graphdef, trainable, frozen)
            terms, told = loss_fn(model, microbatch, key)
            _check_names("loss_fn", terms, coefficients)
            loss = sum(
                (
                    coefficients[name] * _share(terms[name].total, weights[name])
                    for name in sorted(coefficients)
                ),
                start=jnp.zeros((), jnp.float32),
            )
            return loss, (loss, told)

        grads, loss, told = _accumulate(loss_of, trainable, batch, key, num_microbatches, layout)
        trainable, opt_state, update = optimizer.update(
            grads,
            state.opt_state,
            trainable,
            step=state.step,
            is_finite=jnp.isfinite(loss),
            is_empty=_is_empty(weights, coefficients),
        )
        state = train_state.TrainState(
            step=state.step + 1,
            params=nnx.merge_state(trainable, frozen),
            opt_state=opt_state,
        )
        return state, _join(told, _own_metrics(loss, update, opt_state))

    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=None if compiler_options is None else dict(compiler_options),
    )


def split_rows(batch: Tree, num_microbatches: int) -> Tree:
    """Split host arrays [rows, ...] into [M, rows / M, ...], M = num_microbatches.

    Raises:
      ValueError: the rows of an array do not divide by M.
    """

    def split(x: np.ndarray) -> np.ndarray:
        if x.shape[0] % num_microbatches:
            raise ValueError(
                f"{x.shape[0]} rows do not divide into num_microbatches={num_microbatches}"
            )
        return x.reshape(num_microbatches, x.shape[0] // num_microbatches, *x.shape[1:])

    return jax.tree.map(split, batch)


def _accumulate(loss_of, trainable, batch, key, num_microbatches, layout):
    """Sum gradients (float32) and loss over the microbatches, and merge their metrics."""
    grad_of = jax.grad(loss_of, has_aux=True)

    def one(index, microbatch):
        grads, (loss, told) = grad_of(trainable, microbatch, jax.random.fold_in(key, index))
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), loss, told

    if num_microbatches == 1:
        return one(0, jax.tree.map(lambda x: x[0], batch))

    def body(summed, xs):
        grads, loss, told = one(*xs)
        return jax.tree.map(jnp.add, summed, grads), (loss, told)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainable)
    if layout is not None:
        zeros = jax.lax.with_sharding_constraint(zeros, layout)
    grads, (losses, told) = jax.lax.scan(body, zeros, (jnp.arange(num_microbatches), batch))
    return grads, jnp.sum(losses), _fold(told)


def _fold(stacked: metrics.Metrics) -> metrics.Metrics:
    """Merge metrics along the leading axis that the scan over microbatches gave them."""
    if not stacked:
        return {}

    def merge(merged, one):
        return {name: merged[name].merge(one[name]) for name in merged}, None

    first = jax.tree.map(lambda x: x[0], stacked)
    rest = jax.tree.map(lambda x: x[1:], stacked)
    return jax.lax.scan(merge, first, rest)[0]


def _share(total: jax.Array, weight: jax.Array) -> jax.Array:
    """Return total / weight of the whole batch, 0 (and a gradient of 0) for an empty term."""
    is_empty = weight == 0
    return jnp.where(is_empty, 0.0, total / jnp.where(is_empty, 1.0, weight))


def _is_empty(weights: Mapping[str, jax.Array], coefficients: Mapping[str, float]) -> jax.Array:
    """Return whether no term that counts has any weight in the whole batch."""
    counted = [weights[name] == 0 for name, factor in coefficients.items() if factor]
    return jnp.stack(counted).all() if counted else jnp.ones((), bool)


def _own_metrics(
    loss: jax.Array, update: optim.Update, opt_state: optim.OptState
) -> metrics.Metrics:
    def mean(value: jax.Array) -> metrics.Mean:
        return metrics.Mean(total=value.astype(jnp.float32), weight=jnp.ones(()))

    return {
        "loss/total": mean(loss),
        "optim/learning_rate": mean(update.learning_rate),
        "optim/grad_norm": mean(update.grad_norm),
        "optim/clipped_fraction": mean(update.is_clipped),
        "optim/skipped_updates": mean(opt_state.num_skipped),
        "optim/skipped_in_row": mean(opt_state.num_skipped_in_row),
        "optim/empty_updates": metrics.Sum(value=update.is_empty.astype(jnp.float32)),
    }


def _join(told: metrics.Metrics, own: metrics.Metrics) -> metrics.Metrics:
    twice = sorted(set(told) & set(own))
    if twice:
        raise ValueError(f"loss_fn returns metrics that the train step makes itself: {twice}")
    return told | own


def _check_names(source: str, got: Mapping[str, Any], coefficients: Mapping[str, float]) -> None:
    if set(got) != set(coefficients):
        raise ValueError(
            f"{source} returns the terms {sorted(got)}, coefficients has {sorted(coefficients)}"
        )


def _check_leading_size(batch: Tree, num_microbatches: int) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        if leaf.ndim == 0 or leaf.shape[0] != num_microbatches:
            raise ValueError(
                f"every leaf of a batch must have num_microbatches={num_microbatches} as its "
                f"leading size; {jax.tree_util.keystr(path)} has the shape {leaf.shape}"
            )
