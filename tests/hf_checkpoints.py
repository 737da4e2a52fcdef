"""Write tiny checkpoint folders as the hub has them: dense, mixture of experts, text, score head.

Names and shapes are written out here by hand, so that the project's own table of names is tested
against something else than itself; `write_with_transformers` makes the same folders with the
classes of `transformers`, and a test asks that both hold the same tensors.
"""

import copy
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

KINDS = ("dense", "moe", "text")
# No two sizes are equal, nor is one the double of another where that could hide a mistake.
_TEXT = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5_000_000.0,
    "rope_scaling": {
        "rope_type": "default",
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
    "attention_bias": False,
}
_VISION = {
    "depth": 4,
    "hidden_size": 24,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 40,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 2],
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


def config_json(kind: str, *, tied: bool, **text: Any) -> dict[str, Any]:
    """Return a `config.json`; `text` changes single sizes of the decoder."""
    if kind == "text":
        values = {**copy.deepcopy(_TEXT), "rope_scaling": None, **text}
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "tie_word_embeddings": tied,
            **values,
        }
    moe = kind == "moe"
    # Copies: the classes of transformers write into what they are given.
    decoder = copy.deepcopy({**_TEXT, **(_EXPERTS if moe else {})})
    decoder |= {"tie_word_embeddings": tied, **text}
    return {
        "architectures": [f"Qwen3VL{'Moe' if moe else ''}ForConditionalGeneration"],
        "model_type": "qwen3_vl_moe" if moe else "qwen3_vl",
        "tie_word_embeddings": tied,
        "image_token_id": 68,
        "video_token_id": 69,
        "vision_start_token_id": 66,
        "vision_end_token_id": 67,
        "text_config": decoder,
        "vision_config": copy.deepcopy(_VISION),
    }


def _vision_shapes() -> dict[str, tuple[int, ...]]:
    d, f, out = _VISION["hidden_size"], _VISION["intermediate_size"], _VISION["out_hidden_size"]
    p = _VISION["patch_size"]
    wide = d * _VISION["spatial_merge_size"] ** 2
    shapes = {
        "patch_embed.proj.weight": (d, 3, 2, p, p),
        "patch_embed.proj.bias": (d,),
        "pos_embed.weight": (_VISION["num_position_embeddings"], d),
    }
    for i in range(_VISION["depth"]):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.{leaf}": (d,) for leaf in ("weight", "bias")}
        for name, rows, columns in (
            ("attn.qkv", 3 * d, d),
            ("attn.proj", d, d),
            ("mlp.linear_fc1", f, d),
            ("mlp.linear_fc2", d, f),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
    mergers = {"merger": d}
    mergers |= {f"deepstack_merger_list.{i}": wide for i in range(2)}
    for name, normed in mergers.items():
        shapes |= {f"{name}.norm.{leaf}": (normed,) for leaf in ("weight", "bias")}
        shapes |= {f"{name}.linear_fc1.weight": (wide, wide), f"{name}.linear_fc1.bias": (wide,)}
        shapes |= {f"{name}.linear_fc2.weight": (out, wide), f"{name}.linear_fc2.bias": (out,)}
    return {f"model.visual.{name}": shape for name, shape in shapes.items()}


def shapes(config: dict[str, Any], *, layout: str) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a checkpoint."""
    text = config.get("text_config", config)
    d, f, h = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    q, kv = text["num_attention_heads"] * h, text["num_key_value_heads"] * h
    prefix = "model." if config["model_type"] == "qwen3" else "model.language_model."
    result = {f"{prefix}embed_tokens.weight": (text["vocab_size"], d), f"{prefix}norm.weight": (d,)}
    for i in range(text["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (q, d),
            "self_attn.k_proj.weight": (kv, d),
            "self_attn.v_proj.weight": (kv, d),
            "self_attn.o_proj.weight": (d, q),
            "self_attn.q_norm.weight": (h,),
            "self_attn.k_norm.weight": (h,),
        }
        if "num_experts" in text:
            e, f = text["num_experts"], text["moe_intermediate_size"]
            swap = slice(None) if layout == "4.57" else slice(None, None, -1)
            layer |= {
                "mlp.gate.weight": (e, d),
                "mlp.experts.gate_up_proj": (e, *(d, 2 * f)[swap]),
                "mlp.experts.down_proj": (e, *(f, d)[swap]),
            }
        else:
            layer |= {
                "mlp.gate_proj.weight": (f, d),
                "mlp.up_proj.weight": (f, d),
                "mlp.down_proj.weight": (d, f),
            }
        result |= {f"{prefix}layers.{i}.{name}": shape for name, shape in layer.items()}
    if config["model_type"] != "qwen3":
        result |= _vision_shapes()
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = (text["vocab_size"], d)
    return result


def random_tensors(
    wanted: dict[str, tuple[int, ...]], *, dtype: Any = ml_dtypes.bfloat16, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return random values, norm scales among them."""
    rng = np.random.default_rng(seed)
    return {
        name: (0.1 * rng.standard_normal(shape)).astype(dtype) for name, shape in wanted.items()
    }


def write_tensors(
    folder: pathlib.Path, config: dict[str, Any], tensors: dict[str, np.ndarray], *, num_files: int
) -> pathlib.Path:
    """Write a folder; one file has no index, as on the hub."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    names = sorted(tensors)
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::num_files]}
        safetensors.numpy.save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write(  # one keyword for each thing that checkpoints differ in
    folder: pathlib.Path,
    kind: str,
    *,
    tied: bool = False,
    layout: str = "4.57",
    score: bool = False,
    num_files: int = 2,
    seed: int = 0,
    dtype: Any = ml_dtypes.bfloat16,
) -> dict[str, np.ndarray]:
    """Write a checkpoint of random values and return its tensors; `score` adds PRISM's head."""
    config = config_json(kind, tied=tied)
    wanted = shapes(config, layout=layout)
    if score:
        wanted["v_head.1.weight"] = (1, _TEXT["hidden_size"])
    tensors = random_tensors(wanted, dtype=dtype, seed=seed)
    write_tensors(folder, config, tensors, num_files=num_files)
    return tensors


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Read all tensors of a folder through the safetensors library."""
    result: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        result |= safetensors.numpy.load_file(file)
    return result


def write_with_transformers(folder: pathlib.Path, kind: str, *, tied: bool) -> None:
    """Write a checkpoint of random values in bfloat16 through transformers' own classes."""
    import torch
    import transformers

    config_class, model_class = {
        "dense": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
        "moe": (transformers.Qwen3VLMoeConfig, transformers.Qwen3VLMoeForConditionalGeneration),
        "text": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[kind]
    model = model_class(config_class(**config_json(kind, tied=tied))).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
