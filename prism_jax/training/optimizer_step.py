"""The optimizer's part of a train step: in one program with the gradients, or layer by layer.

With `optim.memory = "host"` the states of stacked layers are kept in the pinned memory of the host,
an array a layer. A step computes the gradients in one program and then walks over the layers:

    to the device      state 1   state 2   state 3   …
    on the device                layer 1   layer 2   layer 3   …
    to the host                            state 1   state 2   …

The device holds the states of few layers at a time, and copies run beside the arithmetic. The host
holds the states once, and of few layers twice: new ones are written before old ones are freed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prism_jax import metrics
from prism_jax.training import optim, optim_kinds, train_state

Tree = Any
Step = Callable[
    [train_state.TrainState, Tree, jax.Array], tuple[train_state.TrainState, metrics.Metrics]
]

METRICS = (
    "optim/learning_rate",
    "optim/grad_norm",
    "optim/clipped_fraction",
    "optim/skipped_updates",
    "optim/skipped_in_row",
    "optim/empty_updates",
)
_AHEAD = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
    """The gradients of a whole batch."""

    values: nnx.State  # of the trainable parameters
    is_finite: jax.Array  # bool[]  the loss is
    is_empty: jax.Array  # bool[]  there is nothing to learn
    metrics: metrics.Metrics


def in_one_program(
    gradients: Callable[..., Gradients],
    optimizer: optim.Optimizer,
    *,
    shardings: train_state.TrainState | None,
    compiler_options: dict[str, Any] | None,
) -> Step:
    """Return the jitted step of an optimizer whose states are on the device; it donates the state.

    Args:
      gradients: (trainable, frozen, batch, key, shardings) -> gradients.
      shardings: of the state; None for one device.
    """

    def step(state: train_state.TrainState, batch: Tree, key: jax.Array):
        trainable, frozen = optimizer.split(state.params)
        layout = None if shardings is None else optimizer.split(shardings.params)[0]
        grads = gradients(trainable, frozen, batch, key, layout)
        trainable, opt_state, update = optimizer.update(
            grads.values,
            state.opt_state,
            trainable,
            step=state.step,
            is_finite=grads.is_finite,
            is_empty=grads.is_empty,
            key=_rounding_key(key),
        )
        state = train_state.TrainState(
            step=state.step + 1,
            params=nnx.merge_state(trainable, frozen),
            opt_state=opt_state,
        )
        return state, grads.metrics | _measured(update, opt_state)

    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiler_options,
    )


class Streamed:
    """The step of an optimizer whose states are in the host's memory; it donates the state."""

    def __init__(
        self,
        gradients: Callable[..., Gradients],
        optimizer: optim.Optimizer,
        *,
        shardings: train_state.TrainState | None,
        compiler_options: dict[str, Any] | None,
    ):
        """See `in_one_program`."""
        self._optimizer, self._shardings = optimizer, shardings
        layout = None if shardings is None else optimizer.split(shardings.params)[0]
        arrays = None if layout is None else optim.arrays_of(layout)

        def differentiate(params: nnx.State, batch: Tree, key: jax.Array, step: jax.Array):
            trainable, frozen = optimizer.split(params)
            grads = gradients(trainable, frozen, batch, key, layout)
            update = optimizer.measure(
                grads.values, step=step, is_finite=grads.is_finite, is_empty=grads.is_empty
            )
            return optim.arrays_of(grads.values), update, grads.metrics

        def layer(number: jax.Array, params: Tree, state: Tree, grads: Tree, key, update):
            """Change one layer of a stack in place."""
            mine = jax.tree.map(lambda x: x[number], (grads, params))
            moved, state = optimizer.advance(
                *mine, state, jax.random.fold_in(key, number), update=update
            )
            return jax.tree.map(lambda x, y: x.at[number].set(y), params, moved), state

        def places(stack: str) -> Tree:
            return None if arrays is None else {n: arrays[n] for n in optimizer.stacks[stack]}

        self._differentiate = jax.jit(
            differentiate,
            out_shardings=(arrays, None, None),
            compiler_options=compiler_options,
        )
        self._plain = jax.jit(
            lambda grads, params, state, key, update: optimizer.advance(
                grads, params, state, key, update=update
            ),
            donate_argnums=(1, 2),
            out_shardings=(places(optim.PLAIN), None) if optim.PLAIN in optimizer.stacks else None,
        )
        self._layers = {
            stack: jax.jit(layer, donate_argnums=(1, 2), out_shardings=(places(stack), None))
            for stack in optimizer.num_layers
        }
        self._count = jax.jit(optim.counted)

    def lower(
        self, state: train_state.TrainState, batch: Tree, key: jax.Array
    ) -> jax.stages.Lowered:
        """Return the gradients' program lowered, the one that needs most memory; see `jax.jit`."""
        return self._differentiate.lower(state.params, batch, key, state.step)

    def _cache_size(self) -> int:
        """Return the number of compilations of the gradients, as jitted functions do."""
        return self._differentiate._cache_size()

    def __call__(
        self, state: train_state.TrainState, batch: Tree, key: jax.Array
    ) -> tuple[train_state.TrainState, metrics.Metrics]:
        optimizer = self._optimizer
        grads, update, logged = self._differentiate(state.params, batch, key, state.step)
        trainable, frozen = optimizer.split(state.params)
        values, inner, moved = optim.arrays_of(trainable), {}, {}
        for number, (stack, names) in enumerate(optimizer.stacks.items()):
            stack_key = jax.random.fold_in(_rounding_key(key), number)
            both = [{name: tree.pop(name) for name in names} for tree in (grads, values)]
            states = state.opt_state.inner[stack]
            if stack == optim.PLAIN:
                values_of, inner[stack] = self._plain(*both, states, stack_key, update)
            else:
                values_of, inner[stack] = self._walk(stack, *both, states, stack_key, update)
            moved |= values_of
        opt_state = self._count(
            optim.OptState(
                inner={},
                num_skipped=state.opt_state.num_skipped,
                num_skipped_in_row=state.opt_state.num_skipped_in_row,
            ),
            {},
            update,
        )
        new = train_state.TrainState(
            step=state.step + 1,
            params=nnx.merge_state(optim.with_arrays(trainable, moved), frozen),
            opt_state=dataclasses.replace(opt_state, inner=inner),
        )
        return new, logged | _measured(update, opt_state)

    def _walk(
        self,
        stack: str,
        grads: optim_kinds.Arrays,
        params: optim_kinds.Arrays,
        states: list[Tree],
        key: jax.Array,
        update: optim.Update,
    ) -> tuple[optim_kinds.Arrays, list[Tree]]:
        """Move the layers of a stack one after the other, their states there and back."""
        homes = [jax.tree.map(lambda x: x.sharding, state) for state in states]
        near = [jax.tree.map(lambda s: s.with_memory_kind("device"), home) for home in homes]
        waiting = [jax.device_put(s, n) for s, n in zip(states[:_AHEAD], near, strict=False)]
        done = []
        for number, old in enumerate(states):
            params, new = self._layers[stack](number, params, waiting.pop(0), grads, key, update)
            done.append(jax.device_put(new, homes[number]))
            following = number + _AHEAD
            if following < len(states):
                # Without waiting every copy would be queued at once, and hold its memory.
                jax.block_until_ready(new)
                waiting.append(jax.device_put(states[following], near[following]))
            # As a donated array: whoever still names the old state keeps none of its memory.
            jax.tree.map(lambda x: x.delete(), old)
        return params, done


def _rounding_key(key: jax.Array) -> jax.Array:
    """Return the key of stochastic rounding; microbatches take small numbers."""
    return jax.random.fold_in(key, 2**31 - 1)


def _measured(update: optim.Update, opt_state: optim.OptState) -> metrics.Metrics:
    means = (
        update.learning_rate,
        update.grad_norm,
        update.is_clipped,
        opt_state.num_skipped,
        opt_state.num_skipped_in_row,
    )
    logged = {
        name: metrics.Mean(total=value.astype(jnp.float32), weight=jnp.ones(()))
        for name, value in zip(METRICS[:-1], means, strict=True)
    }
    return logged | {METRICS[-1]: metrics.Sum(value=update.is_empty.astype(jnp.float32))}
