"""The form of the parameters that decoding reads: arrays layer by layer, in the compute dtype."""

import functools

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

_STACK = ("text", "layers")


def prepare(
    graphdef: nnx.GraphDef, params: nnx.State, *, dtype: DTypeLike, donate: bool
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return graph and parameters with the decoder's layers one by one, cast to `dtype`.

    Args:
      donate: free each parameter of `params` as soon as it is copied, so that both forms never
        lie on the device together.
    """
    unstacked = nnx.eval_shape(lambda: _unstack(graphdef, params))
    new_graph, abstract = nnx.split(unstacked)
    flat = {}
    for path, param in nnx.to_flat_state(params):
        value = param[...]
        if path[:2] == _STACK:
            layers = _slice(value.sharding, value.shape[0], dtype)(value)
            for number, layer in enumerate(layers):
                flat[(*_STACK, number, *path[2:])] = layer
        else:
            # A cast to the same type would be the same buffer: copy, unless it may be kept.
            flat[path] = value if donate and value.dtype == dtype else value.astype(dtype)
        if donate and flat.get(path) is not value:
            value.delete()
    filled = [(path, leaf.replace(flat[path])) for path, leaf in nnx.to_flat_state(abstract)]
    return new_graph, nnx.from_flat_state(filled)


def _unstack(graphdef: nnx.GraphDef, params: nnx.State) -> nnx.Module:
    model = nnx.merge(graphdef, params)
    model.text.unstack()
    return model


@functools.cache
def _slice(sharding: jax.sharding.Sharding, num_layers: int, dtype: DTypeLike):
    """Return the jitted cut of a stack into layers; each keeps its place on the mesh."""
    out = None
    if isinstance(sharding, NamedSharding):
        out = [NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))] * num_layers
    return jax.jit(lambda x: [x[i].astype(dtype) for i in range(num_layers)], out_shardings=out)
