"""The mean of the discriminator's weights over its updates, whose scores reward the policy.

    mean ← d · mean + (1 − d) · weights      after the updates of a step

It is float32 whatever the weights are: in bfloat16 a mean with d near 1 would not move. It begins
with the discriminator's weights, lies on the devices as they do, and is saved with them.
Source: arXiv 1806.04498.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from prism_jax.setup import models as setup_models

NAME = "mean_discriminator"  # in the state


def make_average(decay: float | None) -> Callable[[nnx.State, nnx.State], nnx.State] | None:
    """Return the jitted (mean, parameters) -> mean; None without a decay. It donates the mean."""
    if decay is None:
        return None

    def average(mean: nnx.State, params: nnx.State) -> nnx.State:
        return jax.tree.map(lambda m, p: decay * m + (1 - decay) * p.astype(m.dtype), mean, params)

    return jax.jit(average, donate_argnums=0)


def with_mean(start: setup_models.Start) -> setup_models.Start:
    """Return the beginning of a state that holds a mean of the discriminator's weights too."""

    # A copy even of float32 weights: both are donated, each to its own program, and must not share
    # memory.
    def wide(x):
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.array(x, jnp.float32 if is_float else x.dtype, copy=True)

    def abstract(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    def make():
        state = start.make()
        return state | {NAME: jax.tree.map(wide, state["discriminator"].params)}

    return setup_models.Start(
        abstract=start.abstract
        | {NAME: jax.tree.map(abstract, start.abstract["discriminator"].params)},
        make=make,
        shardings=start.shardings | {NAME: start.shardings["discriminator"].params},
    )
