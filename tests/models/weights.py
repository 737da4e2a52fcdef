"""Move values between Hugging Face's names and our parameters, for tests that need no files."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.hf import names as hf_names


def _leaves(state: nnx.State) -> list[tuple[str, nnx.Variable]]:
    flat = nnx.to_flat_state(state)
    return [(".".join(map(str, path)), leaf) for path, leaf in flat]


def fill(
    state: nnx.State, config_json: dict, value: Callable[[str, tuple[int, ...]], np.ndarray]
) -> nnx.State:
    """Return the state with each parameter cut out of `value(name, shape)` (layout 5)."""
    names = hf_names.naming(config_json)

    def one(path: str, param: nnx.Variable) -> nnx.Variable:
        entry = hf_names.weight(path, param.shape, names, "5")
        layers = []
        for name in entry.names:
            whole = value(name, entry.disk_shape).reshape(entry.view)
            layers.append(np.split(whole, entry.parts, entry.axis)[entry.part])
        layers = [layer.transpose(entry.order) for layer in layers]
        array = layers[0] if entry.num_layers is None else np.stack(layers)
        assert array.shape == param.shape, path
        return param.replace(jnp.asarray(array))

    flat = {tuple(path.split(".")): one(path, leaf) for path, leaf in _leaves(state)}
    return nnx.from_flat_state(flat)


def disk_shapes(state: nnx.State, config_json: dict, layout: str) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of the checkpoint that holds these parameters."""
    names = hf_names.naming(config_json)
    entries = [hf_names.weight(path, leaf.shape, names, layout) for path, leaf in _leaves(state)]
    return {name: entry.disk_shape for entry in entries for name in entry.names}


def by_name(state: nnx.State, config_json: dict) -> dict[str, np.ndarray]:
    """Return the parameters (or their gradients) under Hugging Face's names (layout 5)."""
    names = hf_names.naming(config_json)
    found: dict[str, dict[int, np.ndarray]] = {}
    entries = {}
    for path, param in _leaves(state):
        entry = hf_names.weight(path, param.shape, names, "5")
        value = np.asarray(jax.device_get(param[...]))
        for number, name in enumerate(entry.names):
            layer = value if entry.num_layers is None else value[number]
            found.setdefault(name, {})[entry.part] = layer.transpose(np.argsort(entry.order))
            entries[name] = entry
    return {
        name: np.concatenate(
            [parts[i] for i in range(entries[name].parts)], entries[name].axis
        ).reshape(entries[name].disk_shape)
        for name, parts in found.items()
    }
