"""Low-rank adapters: a linear map x W becomes x W + (x A) B times alpha / rank.

W is frozen, A and B are trained; B begins at 0, so that an adapted model begins as its base. The
parameters alone say which maps are adapted: `merge` makes plain parameters of them.

Source: LoRA, arXiv 2106.09685, section 4.1.
"""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from models import layers

NAMES = ("lora_a", "lora_b", "lora_scale")
# Of whole paths: everything but the adapters.
FROZEN = r"(?!.*/lora_[ab]$).*"


def add(
    model: nnx.Module, *, rank: int, alpha: float, targets: Sequence[str], rngs: nnx.Rngs
) -> None:
    """Adapt the linear maps whose whole path a pattern matches, "text/layers/attn/q".

    Raises:
      ValueError: a pattern is malformed or matches no linear map.
    """
    maps = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, layers.Linear)
    }
    chosen: set[str] = set()
    for pattern in targets:
        try:
            matched = {name for name in maps if re.fullmatch(pattern, name)}
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        if not matched:
            raise ValueError(f"{pattern!r} matches no linear map; there are {sorted(maps)}")
        chosen |= matched
    for name in sorted(chosen):
        _adapt(maps[name], rank=rank, alpha=alpha, rngs=rngs)


def _adapt(module: layers.Linear, *, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
    """Give one map its adapter, in float32 whatever its kernel is kept in."""
    *stack, size_in, size_out = module.kernel.shape
    *first, axis_in, axis_out = module.kernel.get_metadata("axes")
    # The bound of PEFT's uniform start: its Kaiming rule with slope sqrt(5) is 1 / sqrt(inputs).
    bound = size_in**-0.5
    start = jax.random.uniform(rngs.params(), (*stack, size_in, rank), minval=-bound, maxval=bound)
    zeros = jnp.zeros((*stack, rank, size_out), jnp.float32)
    scale = jnp.full(tuple(stack), alpha / rank, jnp.float32)
    shared = {"is_adapter": True}
    module.lora_a = nnx.data(nnx.Param(start, axes=(*first, axis_in, None), **shared))
    module.lora_b = nnx.data(nnx.Param(zeros, axes=(*first, None, axis_out), **shared))
    module.lora_scale = nnx.data(nnx.Param(scale, axes=tuple(first), **shared))


def is_adapter(path: Sequence[str]) -> bool:
    """Return whether a path of a parameter is one of an adapter's."""
    return path[-1] in NAMES


def split(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Return the parameters of the base and those of the adapters."""
    flat = list(nnx.to_flat_state(params))
    parts = [[(p, v) for p, v in flat if is_adapter(p) == wanted] for wanted in (False, True)]
    return tuple(nnx.from_flat_state(part) for part in parts)


def merge(params: nnx.State) -> nnx.State:
    """Return plain parameters: each adapted kernel plus its adapter, in the kernel's dtype."""
    flat = dict(nnx.to_flat_state(params))
    merged = []
    for path, variable in flat.items():
        if is_adapter(path):
            continue
        a = flat.get((*path[:-1], "lora_a"))
        if path[-1] == "kernel" and a is not None:
            b, scale = (flat[*path[:-1], name][...] for name in NAMES[1:])
            change = jnp.matmul(a[...], b, precision="highest") * scale[..., None, None]
            kernel = variable[...]
            variable = variable.replace((kernel.astype(jnp.float32) + change).astype(kernel.dtype))
        merged.append((path, variable))
    return nnx.from_flat_state(merged)


def merged(graphdef: nnx.GraphDef, params: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
    """Return graph and parameters of the plain model; a model without adapters is returned."""
    if not nnx.to_flat_state(split(params)[1]):
        return graphdef, params
    model = nnx.merge(graphdef, params)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, layers.Linear):
            module.lora_a, module.lora_b, module.lora_scale = None, None, None
    return nnx.split(model)[0], jax.jit(merge)(params)
