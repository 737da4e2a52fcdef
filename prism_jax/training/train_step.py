"""One optimizer step as a pure jitted function, the same for any split into microbatches.

A loss returns sums, never means. Their weights over the whole batch are computed from the masks
before the first microbatch runs, so each microbatch adds its exact share of the gradient:

  loss = sum over terms k of  coefficient_k * total_k(whole batch) / weight_k(whole batch)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prism_jax import metrics
from prism_jax.losses import reduce
from prism_jax.training import optim, optimizer_step, train_state

Tree = Any
Terms = dict[str, reduce.Sum]
LossFn = Callable[[nnx.Module, Tree, jax.Array], tuple[Terms, metrics.Metrics]]
WeightsFn = Callable[[Tree], dict[str, jax.Array]]
TrainStep = Callable[
    [train_state.TrainState, Tree, jax.Array], tuple[train_state.TrainState, metrics.Metrics]
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WithShared:
    """A batch with arrays that all its microbatches read, such as a teacher's parameters.

    A loss gets one microbatch of `rows` with all of `shared`, which has no gradient.
    """

    rows: Any  # [M, rows, ...]
    shared: Any


_OWN_METRICS = {"loss/total", *optimizer_step.METRICS}


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
    """Return the compiled `(state, batch, key) -> (state, metrics)`; it donates the state.

    A step whose loss or gradient is not finite changes nothing but `step` and the counts of
    skipped updates, which the metrics `optim/skipped_updates` and `optim/skipped_in_row` show. Nor
    does a step without anything to learn, in which each term with a coefficient has the weight 0:
    `optim/empty_updates` is then 1.

    Args:
      graphdef: static structure of the model, from `training.train_state.abstract_params`.
      loss_fn: (model, microbatch, key) -> (terms, metrics); the key differs for each microbatch.
      optimizer: made for the same parameters; decides which of them are differentiated.
      weights_fn: the whole batch, [M, rows, ...] -> the weight of each term over all of it. A
        term of weight 0 adds 0. Of a `WithShared` only the rows have the leading size.
      coefficients: factor of each term in the loss; its keys are exactly the terms.
      num_microbatches: M, the leading size of every leaf of a batch (`batches.split` makes it).
      shardings: of the state, so that it never changes its layout; None for one device.
      compiler_options: of XLA, by their names without `--`; None leaves its defaults.
    """
    gradients = functools.partial(
        _gradients,
        graphdef,
        loss_fn,
        optimizer,
        weights_fn=weights_fn,
        coefficients=coefficients,
        num_microbatches=num_microbatches,
    )
    make = optimizer_step.in_one_program
    if optimizer.memory == "host":
        make = optimizer_step.Streamed
    return make(
        gradients,
        optimizer,
        shardings=shardings,
        compiler_options=None if compiler_options is None else dict(compiler_options),
    )


def _gradients(
    graphdef: nnx.GraphDef,
    loss_fn: LossFn,
    optimizer: optim.Optimizer,
    trainable: nnx.State,
    frozen: nnx.State,
    batch: Tree,
    key: jax.Array,
    layout: Tree | None,
    *,
    weights_fn: WeightsFn,
    coefficients: Mapping[str, float],
    num_microbatches: int,
) -> optimizer_step.Gradients:
    """Return the gradients of a whole batch, see `make_train_step`.

    Args:
      layout: shardings of the gradients; None for one device.
    """
    rows = batch.rows if isinstance(batch, WithShared) else batch
    _check_leading_size(rows, num_microbatches)
    weights = weights_fn(batch)
    _check_names("weights_fn", weights, coefficients)

    def loss_of(trainable, microbatch, key):
        model = nnx.merge(graphdef, trainable, frozen)
        if isinstance(batch, WithShared):
            microbatch = WithShared(rows=microbatch, shared=batch.shared)
        terms, logged = loss_fn(model, microbatch, key)
        _check_names("loss_fn", terms, coefficients)
        _check_metrics(logged)
        loss = sum(
            (
                coefficients[name] * _share(terms[name].total, weights[name])
                for name in sorted(coefficients)
            ),
            start=jnp.zeros((), jnp.float32),
        )
        return loss, logged

    grads, loss, logged = _accumulate(loss_of, trainable, rows, key, num_microbatches, layout)
    total = metrics.Mean(total=loss.astype(jnp.float32), weight=jnp.ones(()))
    return optimizer_step.Gradients(
        values=grads,
        is_finite=jnp.isfinite(loss),
        is_empty=_is_empty(weights, coefficients),
        metrics=logged | {"loss/total": total},
    )


def _accumulate(loss_of, trainable, batch, key, num_microbatches, layout):
    """Sum gradients and loss over the microbatches, and merge their metrics.

    The sum is float32 and is changed in place: the backward pass adds to it layer by layer, so
    that no second set of gradients exists.
    """
    if num_microbatches == 1:
        only = jax.tree.map(lambda x: x[0], batch)
        grad_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, logged), grads = grad_of(trainable, only, jax.random.fold_in(key, 0))
        return grads, loss, logged
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainable)
    if layout is not None:
        zeros = jax.lax.with_sharding_constraint(zeros, layout)
    xs = (jnp.arange(num_microbatches), batch)
    if any(p.dtype != jnp.float32 for p in jax.tree.leaves(trainable)):
        # A backward pass adds in the parameters' dtype alone.
        grads, (losses, logged) = jax.lax.scan(
            functools.partial(_add_microbatch, loss_of, trainable, key), zeros, xs
        )
        return grads, jnp.sum(losses), _fold(logged)
    sums = jax.tree.map(jax.new_ref, zeros)

    def body(_, xs):
        index, microbatch = xs
        microbatch_key = jax.random.fold_in(key, index)
        loss, backward, logged = jax.vjp(
            lambda trainable: loss_of(trainable, microbatch, microbatch_key),
            trainable,
            has_aux=True,
        )
        backward.with_refs(sums)(jnp.ones_like(loss))
        return None, (loss, logged)

    _, (losses, logged) = jax.lax.scan(body, None, xs)
    return jax.tree.map(jax.freeze, sums), jnp.sum(losses), _fold(logged)


def _add_microbatch(loss_of, trainable, key, summed, xs):
    """Add the gradients of one microbatch to the sum."""
    index, microbatch = xs
    grad_of = jax.value_and_grad(loss_of, has_aux=True)
    (loss, logged), grads = grad_of(trainable, microbatch, jax.random.fold_in(key, index))
    return jax.tree.map(lambda s, g: s + g.astype(s.dtype), summed, grads), (loss, logged)


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


def _check_metrics(logged: metrics.Metrics) -> None:
    twice = sorted(set(logged) & _OWN_METRICS)
    if twice:
        raise ValueError(f"loss_fn returns metrics that the train step makes itself: {twice}")


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
