"""Tiny models and batches for comparison with Hugging Face, made from seeds alone."""

import dataclasses
import zlib

import jax
import numpy as np

from models import inputs

IMAGE, VIDEO, START, END = 190, 191, 192, 193
VOCAB = 200


def config_json(
    *,
    num_experts: int | None,
    tied: bool,
    num_layers: int,
    vision_heads: tuple[int, int],  # how many, and their size
    deepstack: list[int],
) -> dict:
    """Return a `config.json` of a tiny model, in the form of the hub's checkpoints."""
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000.0,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_section": [6, 3, 3],
            "mrope_interleaved": True,
        },
        "attention_bias": False,
        "tie_word_embeddings": tied,
    }
    model_type = "qwen3_vl"
    if num_experts is not None:
        model_type = "qwen3_vl_moe"
        text |= {
            "model_type": "qwen3_vl_moe_text",
            "num_experts": num_experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
    heads, size = vision_heads
    vision = {
        "model_type": model_type,
        "depth": 4,
        "hidden_size": heads * size,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 96,
        "num_heads": heads,
        "in_channels": 3,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 48,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": deepstack,
    }
    name = "Qwen3VLMoe" if num_experts is not None else "Qwen3VL"
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": model_type,
        "text_config": text,
        "vision_config": vision,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "tie_word_embeddings": tied,
    }


CONFIGS = {
    "dense_tied_2_levels_head64": config_json(
        num_experts=None, tied=True, num_layers=3, vision_heads=(2, 64), deepstack=[0, 2]
    ),
    "dense_untied_3_levels_head72": config_json(
        num_experts=None, tied=False, num_layers=4, vision_heads=(2, 72), deepstack=[0, 1, 3]
    ),
    "moe_untied": config_json(
        num_experts=4, tied=False, num_layers=3, vision_heads=(2, 16), deepstack=[1, 2]
    ),
    "moe_tied_8_experts": config_json(
        num_experts=8, tied=True, num_layers=2, vision_heads=(1, 32), deepstack=[3]
    ),
}


def _rng(*names: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32("/".join(map(str, names)).encode()))


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the value of a Hugging Face tensor, from its name alone; norms are near 1."""
    value = _rng(name).standard_normal(shape).astype(np.float32)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * value
    return 0.12 * value


def example(name: str, *parts: int | tuple[str, tuple[int, int, int]]) -> inputs.Example:
    """Build a sequence: an int is that many words, ("image" | "video", grid) a picture."""
    rng = _rng("example", name)
    tokens, grids, pixels = [], [], []
    for part in parts:
        if isinstance(part, int):
            tokens += rng.integers(1, 180, part).tolist()
            continue
        kind, (t, h, w) = part
        frames = t if kind == "video" else 1
        for frame in range(frames):
            if frame:
                tokens += rng.integers(1, 180, 2).tolist()  # the time stamp between frames
            tokens += [START] + [VIDEO if kind == "video" else IMAGE] * (h * w // 4) + [END]
        grids.append((t, h, w))
        pixels.append(rng.uniform(-1, 1, (t * h * w, 3 * 2 * 4 * 4)).astype(np.float32))
    array = np.array(tokens, np.int32)
    token_types = np.where(array == IMAGE, 1, np.where(array == VIDEO, 2, 0))
    return inputs.Example(tokens=array, token_types=token_types, grids=grids, pixels=pixels)


ROWS = {
    "text_alone": [example("t0", 17), example("t1", 9)],
    "one_image": [example("i0", 4, ("image", (1, 4, 6)), 5)],
    "two_images_of_different_size": [
        example("d0", 3, ("image", (1, 6, 4)), 2, ("image", (1, 2, 8)), 6)
    ],
    "rows_of_different_length": [
        example("r0", 3, ("image", (1, 4, 4)), 7),
        example("r1", 6),
        example("r2", 1, ("image", (1, 2, 2)), 2, ("image", (1, 8, 6)), 1),
    ],
    "a_video": [example("v0", 2, ("video", (3, 4, 6)), 5), example("v1", 3)],
    "a_video_and_an_image": [
        example("w0", 2, ("image", (1, 4, 2)), 2, ("video", (2, 2, 4)), 3, ("image", (1, 2, 4)), 2)
    ],
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One example a row, padded on the right, and the images of all rows in one vision row."""

    text: inputs.TextInput
    vision: inputs.VisionInput | None


def batch(rows: list[list[inputs.Example]], config, *, row_tokens: int | None = None) -> Batch:
    """Pack rows; by default a row is as long as the longest needs."""
    longest = max(sum(len(e.tokens) for e in row) for row in rows)
    patches = sum(len(p) for row in rows for e in row for p in e.pixels)
    return Batch(
        text=inputs.pack_text(
            rows,
            config=config,
            row_tokens=row_tokens or longest,
            max_segments=8,
            num_vision_rows=1,
        ),
        vision=inputs.pack_vision(
            rows,
            config=config,
            row_patches=patches + 8,
            max_segments=16,
            num_vision_rows=1,
        ),
    )


def cotangent(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return fixed weights that turn an output into a scalar whose gradients are compared."""
    return _rng("cotangent", name).standard_normal(shape).astype(np.float32)
