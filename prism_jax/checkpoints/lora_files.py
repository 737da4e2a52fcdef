"""An adapter as a folder that PEFT reads: adapter_config.json and adapter_model.safetensors.

Source: peft 0.18 src/peft/utils/save_and_load.py: names begin with `base_model.model.`, A is
[rank, inputs] and B [outputs, rank].
"""

import json
import pathlib
from collections.abc import Mapping

import numpy as np
from flax import nnx
from safetensors import numpy as safetensors

from models import lora
from models.hf import names as hf_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def tensors(
    adapters: nnx.State, naming: hf_names.Naming
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return the tensors by PEFT's names, and alpha / rank of each adapted module."""
    flat = dict(nnx.to_flat_state(adapters))
    arrays: dict[str, np.ndarray] = {}
    scales: dict[str, float] = {}
    for path, variable in flat.items():
        if path[-1] != "lora_a":
            continue
        module = path[:-1]
        template = hf_names.module_name(".".join(module), naming)
        parts = [np.asarray(variable[...], np.float32)]
        parts += [np.asarray(flat[*module, name][...], np.float32) for name in lora.NAMES[1:]]
        is_stacked = parts[0].ndim == 3
        for layer in range(len(parts[0]) if is_stacked else 1):
            a, b, scale = (part[layer] for part in parts) if is_stacked else parts
            name = template.format(layer)
            arrays[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(a.T)
            arrays[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(b.T)
            scales[name] = float(scale)
    return arrays, scales


def save(folder: pathlib.Path, adapters: nnx.State, naming: hf_names.Naming, *, base: str) -> None:
    """Write the adapter into a new folder.

    Args:
      base: name or folder of the base model, as PEFT keeps it.
    """
    arrays, scales = tensors(adapters, naming)
    rank = next(iter(arrays.values())).shape[0]
    (scale,) = set(scales.values())
    folder.mkdir(parents=True)
    safetensors.save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_config(rank, scale, list(scales), base), indent=1))


def _config(rank: int, scale: float, modules: list[str], base: str) -> Mapping[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
