"""The form of the parameters that decoding reads: arrays layer by layer, in the compute dtype.

A step of decoding takes as long as reading the weights, and few large matmuls read them faster than
many small ones: maps of the same input are joined, see `models.decoder_layer`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from models import decoder_layer
from models.config import TextConfig

_STACK = ("text", "layers")


@dataclasses.dataclass(frozen=True)
class _Made:
    """Say from which stacked parameters one of a layer is made."""

    sources: tuple[tuple[str, ...], ...]
    join: Callable[..., jax.Array] | None  # None: it is the only source
    # Which axis of the last source, its stack left out, each axis lies on the mesh as.
    axes: tuple[int | None, ...] | None


def prepare(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    *,
    dtype: DTypeLike,
    donate: bool,
    join: bool = True,
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return graph and parameters with the decoder's layers one by one, cast to `dtype`.

    Args:
      donate: free each parameter of `params` as soon as it is copied, so that both forms never
        lie on the device together.
      join: join q, k, v and gate, up. Where the mesh cuts a kv head, or queries otherwise than
        keys, q, k and v stay apart.
    """
    values = {path: param[...] for path, param in nnx.to_flat_state(params)}
    model = nnx.eval_shape(lambda: _unstack(graphdef, params, values, join=join))
    new_graph, abstract = nnx.split(model)
    num_layers, joined = model.text.config.num_layers, _joined(model.text.config)
    flat = {}
    for path, value in values.items():
        if path[:2] != _STACK:
            # A cast to the same type would be the same buffer: copy, unless it may be kept.
            flat[path] = value if donate and value.dtype == dtype else value.astype(dtype)
            if donate and flat[path] is not value:
                value.delete()
    for path in [path for path, _ in nnx.to_flat_state(abstract) if path[:3] == (*_STACK, 0)]:
        made = joined.get(path[3:], _Made((path[3:],), None, None))
        sources = [values[(*_STACK, *source)] for source in made.sources]
        layers = _cut(_place(sources[-1], made.axes), made.join, num_layers, dtype)(*sources)
        for number, layer in enumerate(layers):
            flat[(*_STACK, number, *path[3:])] = layer
        if donate:
            for value in sources:
                value.delete()
    filled = [(path, leaf.replace(flat[path])) for path, leaf in nnx.to_flat_state(abstract)]
    return new_graph, nnx.from_flat_state(filled)


def _unstack(graphdef: nnx.GraphDef, params: nnx.State, values: dict, *, join: bool) -> nnx.Module:
    model = nnx.merge(graphdef, params)
    model.text.unstack()
    if join:
        q, k = (values[(*_STACK, "attn", name, "kernel")] for name in ("q", "k"))
        model.text.join(heads=is_cut_between_heads(q, k, model.text.config.num_kv_heads))
    return model


@functools.cache
def _joined(config: TextConfig) -> dict[tuple[str, ...], _Made]:
    """Return the parameters that `join` makes."""

    def of(part: str, leaf: str, *names: str) -> tuple[tuple[str, ...], ...]:
        return tuple((part, name, leaf) for name in names)

    groups = config.num_heads // config.num_kv_heads
    return {
        ("attn", "qkv", "kernel"): _Made(
            of("attn", "kernel", "q", "k", "v"),
            functools.partial(decoder_layer.join_qkv, head_dim=config.head_dim),
            (0, 1, None, None),
        ),
        ("attn", "qk_norm", "scale"): _Made(
            of("attn", "scale", "q_norm", "k_norm"),
            functools.partial(decoder_layer.join_norms, groups=groups),
            (None, 0),
        ),
        ("mlp", "gate_up", "kernel"): _Made(
            of("mlp", "kernel", "gate", "up"), decoder_layer.join_gate_up, (0, None, 1)
        ),
    }


def _spec(stack: jax.Array | jax.ShapeDtypeStruct) -> tuple:
    """Return how each axis behind the stack lies on the mesh."""
    spec = tuple(stack.sharding.spec)
    return (spec + (None,) * (stack.ndim - len(spec)))[1:]


def is_cut_between_heads(
    q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct, num_kv_heads: int
) -> bool:
    """Tell whether the mesh leaves kv heads whole, each with its queries; of stacked kernels."""
    if not isinstance(k.sharding, NamedSharding):
        return True
    axes = _spec(k)[-1]
    names = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(k.sharding.mesh.shape[name] for name in names)
    return _spec(q)[-1] == axes and num_kv_heads % parts == 0


def _place(stack: jax.Array, axes: tuple[int | None, ...] | None) -> NamedSharding | None:
    """Return where one layer of what is made of a stack lies; None: where JAX puts it."""
    if not isinstance(stack.sharding, NamedSharding):
        return None
    spec = _spec(stack)
    if axes is not None:
        spec = [None if axis is None else spec[axis] for axis in axes]
    return NamedSharding(stack.sharding.mesh, PartitionSpec(*spec))


@functools.cache
def _cut(
    place: NamedSharding | None,
    join: Callable[..., jax.Array] | None,
    num_layers: int,
    dtype: DTypeLike,
):
    """Return the jitted cut of stacks into layers; each keeps its place on the mesh."""

    def cut(*stacks: jax.Array) -> list[jax.Array]:
        layers = [[stack[i].astype(dtype) for stack in stacks] for i in range(num_layers)]
        return [layer[0] if join is None else join(*layer) for layer in layers]

    return jax.jit(cut, out_shardings=None if place is None else [place] * num_layers)
