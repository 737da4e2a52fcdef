"""The form of the parameters that decoding reads: arrays layer by layer, in the compute dtype.

A step of decoding takes as long as reading the weights, and few large matmuls read them faster than
many small ones: maps of the same input are joined, see `models.decoder_layer`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.typing import DTypeLike

from models import decoder_layer, sharding
from models.config import TextConfig

_STACK = ("text", "layers")


@dataclasses.dataclass(frozen=True)
class _Made:
    """The stacked parameters from which one of a layer is made."""

    sources: tuple[tuple[str, ...], ...]
    join: Callable[..., jax.Array] | None  # None: it is the only source


def prepare(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    *,
    dtype: DTypeLike,
    donate: bool,
    mesh: Mesh | None,
    rules: sharding.Rules,
    join: bool | None = None,
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return graph and parameters with the decoder's layers one by one, cast to `dtype`.

    Args:
      donate: free each parameter of `params` as soon as it is copied, so that both forms never
        lie on the device together.
      mesh: where the result lies, by its logical axes; of the devices of `params`, in their order
        (see `layout.mesh`). None: JAX decides.
      join: join q, k, v and gate, up; None: unless on a TPU, where a chunk would copy the joined
        ones to another layout. Where the mesh cuts a kv head, or queries otherwise than keys, q, k
        and v stay apart.
    """
    if join is None:
        join = joins_maps(jax.default_backend())
    values = {path: param[...] for path, param in nnx.to_flat_state(params)}
    config = nnx.merge(graphdef, params).text.config
    heads = is_cut_between_heads(mesh, rules, config.num_kv_heads)
    new_graph, shapes = unstacked(graphdef, params, join=join, heads=heads)
    leaves = nnx.to_flat_state(shapes)
    places = {path: _place(leaf, mesh, rules) for path, leaf in leaves}
    flat = {}
    for path, value in values.items():
        if path[:2] != _STACK:
            flat[path] = _settled(_cast(value, dtype, places[path], donate=donate))
            if donate and flat[path] is not value:
                value.delete()
    joined = _joined(config)
    for path in [path for path in places if path[:3] == (*_STACK, 0)]:
        made = joined.get(path[3:], _Made((path[3:],), None))
        sources = [values[(*_STACK, *source)] for source in made.sources]
        layers = _settled(_cut(places[path], made.join, config.num_layers, dtype)(*sources))
        for number, layer in enumerate(layers):
            flat[(*_STACK, number, *path[3:])] = layer
        if donate:
            for value in sources:
                value.delete()
    filled = [(path, leaf.replace(flat[path])) for path, leaf in leaves]
    return new_graph, nnx.from_flat_state(filled)


def joins_maps(platform: str) -> bool:
    """Return whether maps of the same input are joined on a platform, see `prepare`."""
    return platform != "tpu"


def unstacked(
    graphdef: nnx.GraphDef, params: nnx.State, *, join: bool, heads: bool
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return graph and parameters with the layers one by one, as shapes; nothing is computed.

    Args:
      params: abstract ones are enough.
      join, heads: join maps of the same input; also q, k and v.
    """

    def unstack(params: nnx.State) -> nnx.Module:
        model = nnx.merge(graphdef, params)
        model.text.unstack()
        if join:
            model.text.join(heads=heads)
        return model

    return nnx.split(nnx.eval_shape(unstack, params))


def placed(
    shapes: nnx.State, *, dtype: DTypeLike, mesh: Mesh | AbstractMesh, rules: sharding.Rules
) -> nnx.State:
    """Return the shapes of `unstacked` with the type and the shardings that `prepare` gives."""
    flat = []
    for path, leaf in nnx.to_flat_state(shapes):
        place = _place(leaf, mesh, rules)
        shape = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=place)
        flat.append((path, leaf.replace(shape)))
    return nnx.from_flat_state(flat)


def _settled(values: Any) -> Any:
    """Wait for them on CPUs of several processes, and return them.

    There each program waits in threads of one pool for the other processes. Many programs at once
    would leave no thread to the device that the others wait for.
    """
    if jax.default_backend() == "cpu" and jax.process_count() > 1:
        jax.block_until_ready(values)
    return values


def _cast(
    value: jax.Array, dtype: DTypeLike, place: NamedSharding | None, *, donate: bool
) -> jax.Array:
    """Return the parameter in its type and place; the same array only where it may be kept."""
    # Not `is_equivalent_to`: a replicated array of another mesh lies on the same devices, but a
    # program takes arrays of one mesh alone.
    is_there = place is None or value.sharding == place
    if donate and value.dtype == dtype and is_there:
        return value
    # A copy even where nothing changes: a jitted function that returns its argument would alias it.
    return _moved(place, dtype)(value)


@functools.cache
def _moved(place: NamedSharding | None, dtype: DTypeLike) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda value: jnp.copy(value).astype(dtype), out_shardings=place)


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
        ),
        ("attn", "qk_norm", "scale"): _Made(
            of("attn", "scale", "q_norm", "k_norm"),
            functools.partial(decoder_layer.join_norms, groups=groups),
        ),
        ("mlp", "gate_up", "kernel"): _Made(
            of("mlp", "kernel", "gate", "up"), decoder_layer.join_gate_up
        ),
    }


def is_cut_between_heads(
    mesh: Mesh | AbstractMesh | None, rules: sharding.Rules, num_kv_heads: int
) -> bool:
    """Return whether the mesh leaves kv heads whole, each with its queries."""
    if mesh is None:
        return True
    axes = rules.mesh_axes("kv_heads")
    parts = math.prod(mesh.shape[name] for name in axes)
    return rules.mesh_axes("heads") == axes and num_kv_heads % parts == 0


def _place(
    leaf: nnx.Variable, mesh: Mesh | AbstractMesh | None, rules: sharding.Rules
) -> NamedSharding | None:
    """Return where a parameter lies; None: where JAX puts it."""
    if mesh is None:
        return None
    return NamedSharding(mesh, sharding.spec(rules, *leaf.get_metadata("axes")))


@functools.cache
def _cut(
    place: NamedSharding | None,
    join: Callable[..., jax.Array] | None,
    num_layers: int,
    dtype: DTypeLike,
):
    """Return the jitted cut of stacks into layers."""

    def cut(*stacks: jax.Array) -> list[jax.Array]:
        layers = [[stack[i].astype(dtype) for stack in stacks] for i in range(num_layers)]
        return [layer[0] if join is None else join(*layer) for layer in layers]

    return jax.jit(cut, out_shardings=None if place is None else [place] * num_layers)
