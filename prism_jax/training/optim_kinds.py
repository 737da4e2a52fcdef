"""Kinds of optimizers by name, each a direction of Optax, and the storage of their states.

  kind       states of a matrix      reads
  adamw      mu, nu                  b1, b2, eps
  lion       mu                      b1, b2
  muon       mu; mu, nu of the rest  b1 (of both), b2 and eps of the rest
  adafactor  a row and a column      eps, added to squares; b1 if not None, then mu too

A step subtracts the direction times the learning rate; decay is added by `training.optim`. All
arithmetic is float32. Parameters of stacked layers are seen one layer at a time, so that a matrix
is a matrix to Muon and Adafactor.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from prism_jax import tree_paths
from prism_jax.training import eight_bit

Tree = Any
Arrays = dict[str, jax.Array]  # by the names of parameters
Kind = Literal["adamw", "adafactor", "muon", "lion"]

# Tables are looked up by row: Muon leaves them to Adam, as its authors do.
_TABLES = {"vocab", "vision_positions", "score", "router"}
# The update of Muon scaled to the size of one of Adam, so that learning rates carry over.
# Source: Moonlight, arXiv 2502.16982, section 2.2.
_MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
    """The numbers of a kind; None where it reads none (`configuration.Optim` checks them)."""

    b1: float | None
    b2: float | None
    eps: float | None
    # Storage of the first moment: a dtype, or "8bit" (`training.eight_bit`).
    mu_dtype: str | None
    nu_dtype: (
        str | None
    )  # of the second; few bits follow slow changes only if rounded stochastically

    @property
    def has_blocks(self) -> bool:
        """Return whether a moment is kept in 8 bits."""
        return eight_bit.NAME in (self.mu_dtype, self.nu_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformation:
    """A transformation of Optax from gradients to directions, in float32."""

    init: Callable[[Arrays], Tree]
    update: Callable[[Arrays, Tree, Arrays], tuple[Arrays, Tree]]  # gradients, state, parameters
    # The directions that `update` returned, from the state that it returned; None where the state
    # is not enough.
    direction: Callable[[Tree], Arrays] | None
    is_elementwise: bool  # no number depends on another one's gradient


def make(
    kind: Kind, numbers: Numbers, axes: Mapping[str, tuple[str | None, ...]]
) -> Transformation:
    """Return the transformation of a kind: the one place where it is chosen.

    Args:
      axes: logical axes of each parameter, without the stack of layers.
    """
    b1, b2, eps = numbers.b1, numbers.b2, numbers.eps
    if kind == "adamw":
        made = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

        def direction(state: optax.ScaleByAdamState) -> Arrays:
            mu = optax.tree.bias_correction(state.mu, b1, state.count)
            nu = optax.tree.bias_correction(state.nu, b2, state.count)
            return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)

        return Transformation(
            init=made.init, update=made.update, direction=direction, is_elementwise=True
        )
    if kind == "lion":
        made = optax.scale_by_lion(b1=b1, b2=b2)
    elif kind == "muon":
        # Optax's Muon returns the step down, a direction is subtracted: hence the sign.
        made = optax.contrib.muon(
            learning_rate=-1.0,
            beta=b1,
            adam_b1=b1,
            adam_b2=b2,
            eps=eps,
            consistent_rms=_MUON_RMS,
            muon_weight_dimension_numbers=lambda params: {n: _matrix(axes[n]) for n in params},
        )
    else:
        steps = [optax.scale_by_factored_rms(epsilon=eps), optax.clip_by_block_rms(1.0)]
        if b1 is not None:
            steps.append(optax.ema(b1, debias=False))
        made = optax.chain(*steps)
    return Transformation(
        init=made.init, update=made.update, direction=None, is_elementwise=kind == "lion"
    )


def _matrix(axes: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """Return which axes are the matrix to Muon, the last two; None: Adam moves the parameter."""
    if len(axes) < 2 or _TABLES & set(axes):
        return None
    return optax.contrib.MuonDimensionNumbers(
        reduction_axis=len(axes) - 2, output_axis=len(axes) - 1
    )


def stored(
    path: tuple, leaf: jax.Array, numbers: Numbers, key: jax.Array | None
) -> jax.Array | eight_bit.Blocks:
    """Return a leaf of a state as it is stored, by its field's name.

    Args:
      key: of stochastic rounding; None rounds to the nearest.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    fields = set(tree_paths.path_name(path).split("/"))
    is_first, is_second = bool(fields & {"mu", "ema"}), "nu" in fields
    dtype = numbers.mu_dtype if is_first else numbers.nu_dtype if is_second else "float32"
    if dtype != eight_bit.NAME:
        return rounded(leaf, jnp.dtype(dtype), key)
    if leaf.size < eight_bit.LEAST_SIZE:
        return leaf
    return eight_bit.encode(leaf, has_sign=is_first, key=key)


def widened(state: Tree) -> Tree:
    """Return a stored state with its floating arrays in float32."""

    def wide(leaf: jax.Array | eight_bit.Blocks) -> jax.Array:
        if eight_bit.is_blocks(leaf):
            return eight_bit.decode(leaf)
        return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(wide, state, is_leaf=eight_bit.is_blocks)


def rounded(x: jax.Array, dtype: jnp.dtype, key: jax.Array | None) -> jax.Array:
    """Return an array in a dtype; without a key rounded to the nearest."""
    if key is None or x.dtype == dtype:
        return x.astype(dtype)
    return stochastic_round(x, dtype, key)


def stochastic_round(x: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    """Round float32 to bfloat16, up with the probability that makes the mean exact.

    A step smaller than half the distance of two neighbours is lost by rounding to the nearest;
    with a learning rate of 1e-6 that is nearly every step. Numbers that are not finite stay so.
    """
    if x.dtype == dtype:
        return x
    if (x.dtype, dtype) != (jnp.float32, jnp.bfloat16):
        raise ValueError(f"stochastic rounding is float32 to bfloat16, not {x.dtype} to {dtype}")
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    high = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(high, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(dtype))
