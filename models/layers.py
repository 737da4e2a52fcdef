"""Linear maps, norms and embeddings; every parameter carries the logical names of its axes."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """The settings with which parameters are made and used.

    `stack` precedes every shape: `(L,)` makes the parameters of L layers at once, and `lax.scan`
    takes one slice per layer.
    """

    rngs: nnx.Rngs
    param_dtype: DTypeLike
    dtype: DTypeLike  # of activations and of both sides of every matmul
    std: float  # of a new weight
    stack: tuple[int, ...] = ()

    def param(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Callable
    ) -> nnx.Param:
        """Make one parameter, stacked if the scope is."""
        if len(shape) != len(axes):
            raise ValueError(f"a parameter of shape {shape} needs as many axes, got {axes}")
        value = init(self.rngs.params(), (*self.stack, *shape), self.param_dtype)
        return nnx.Param(value, axes=("layers",) * len(self.stack) + axes)

    def normal(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        """Make one weight, drawn from a normal distribution around 0."""
        return self.param(shape, axes, jax.nn.initializers.normal(self.std))

    def stacked(self, num_layers: int) -> "Scope":
        """Return the scope in which `num_layers` layers are made at once."""
        return dataclasses.replace(self, stack=(num_layers,))


class Linear(nnx.Module):
    """A linear map: x W (+ b), plus the output of an adapter, see `lora`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        use_bias: bool,
        scope: Scope,
    ):
        self.dtype = scope.dtype
        self.kernel = scope.normal((in_features, out_features), axes)
        self.bias = (
            scope.param((out_features,), axes[1:], jax.nn.initializers.zeros) if use_bias else None
        )
        self.lora_a, self.lora_b, self.lora_scale = None, None, None

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        x = x.astype(self.dtype)
        y = x @ self.kernel[...].astype(self.dtype)
        if self.lora_a is not None:
            inner = x @ self.lora_a[...].astype(self.dtype)
            scale = self.lora_scale[...].astype(self.dtype)
            y = y + inner @ self.lora_b[...].astype(self.dtype) * scale
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Joined(nnx.Module):
    """Several linear maps of one input as one matmul: x W with W of [D, *outputs]."""

    def __init__(self, kernel: jax.Array, *, axes: tuple[str | None, ...], dtype: DTypeLike):
        self.dtype = dtype
        self.kernel = nnx.Param(kernel, axes=axes)

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows_and_outputs"]:
        return jnp.tensordot(x.astype(self.dtype), self.kernel[...].astype(self.dtype), 1)


class Embedding(nnx.Module):
    """A table of vectors, looked up by row or used as an output head."""

    def __init__(
        self, num_rows: int, features: int, *, axes: tuple[str | None, str | None], scope: Scope
    ):
        self.dtype = scope.dtype
        self.embedding = scope.normal((num_rows, features), axes)

    def __call__(self, rows: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        return self.embedding[...].astype(self.dtype)[rows]


class RMSNorm(nnx.Module):
    """A scale to root mean square 1, in float32, then by a learned weight.

    Source: transformers models/qwen3_vl/modeling_qwen3_vl.py Qwen3VLTextRMSNorm: the weight is
    applied after the cast back.
    """

    def __init__(self, features: int, *, eps: float, scope: Scope):
        self.eps = eps
        self.scale = scope.param((features,), ("norm",), jax.nn.initializers.ones)

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * wide.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalisation to mean 0 and variance 1, in float32, then a learned scale and bias."""

    def __init__(self, features: int, *, eps: float, scope: Scope):
        self.eps = eps
        self.scale = scope.param((features,), ("norm",), jax.nn.initializers.ones)
        self.bias = scope.param((features,), ("norm",), jax.nn.initializers.zeros)

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        wide = centred * jax.lax.rsqrt(variance + self.eps)
        wide = wide * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return wide.astype(x.dtype)


def unstack(module: nnx.Module, num_layers: int) -> list[nnx.Module]:
    """Return the layers of a stacked module, one module each, with the axes of one layer."""
    graphdef, params = nnx.split(module)

    def cut(param: nnx.Variable, layer: int) -> nnx.Variable:
        # Not `[layer]`: JAX 0.10 cannot add the gradient of such a slice to a sum in place.
        one = jax.lax.index_in_dim(param[...], layer, axis=0, keepdims=False)
        return param.replace(one, axes=param.get_metadata("axes")[1:])

    def layer(number: int) -> nnx.Module:
        cut_params = jax.tree.map(
            lambda param: cut(param, number),
            params,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        return nnx.merge(graphdef, cut_params)

    return [layer(number) for number in range(num_layers)]
