"""Sizes and inputs that the benchmarks share."""

import numpy as np

from models import config as config_lib
from models import presets

SIZES = {
    "tiny": presets.TINY,
    "2b": presets.QWEN3_VL_2B,
    "4b": presets.QWEN3_VL_4B,
    "8b": presets.QWEN3_VL_8B,
}


def config_json(config: config_lib.Qwen3VLConfig) -> dict:
    """Write a dense model's sizes as the `config.json` of the hub."""
    text, vision = config.text, config.vision
    ids = {"image_token_id": config.image_token_id, "video_token_id": config.video_token_id}
    ids |= {
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
    }
    if text.vocab_size < config.image_token_id:
        ids = {name: text.vocab_size - 10 + number for number, name in enumerate(ids)}
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": text.tie_word_embeddings,
        **ids,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_theta,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": list(text.mrope_section),
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": text.tie_word_embeddings,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "depth": vision.num_layers,
            "num_heads": vision.num_heads,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "out_hidden_size": vision.out_hidden_size,
            "num_position_embeddings": vision.num_position_embeddings,
            "deepstack_visual_indexes": list(vision.deepstack_layers),
        },
    }


def example(
    config: config_lib.Qwen3VLConfig, *, num_words: int = 66, side: int = 32
) -> dict[str, np.ndarray]:
    """Return words around one picture, of 512 x 512 pixels and so 256 tokens if not told.

    Args:
      side: of the picture, in patches.
    """
    rng = np.random.default_rng(0)
    ids = config_json(config)
    words = rng.integers(0, min(config.text.vocab_size - 10, 150_000), num_words)
    half = num_words // 2
    shown = [ids["vision_start_token_id"], *[ids["image_token_id"]] * (side**2 // 4)]
    tokens = np.concatenate([words[:half], shown, [ids["vision_end_token_id"]], words[half:]])
    return {
        "tokens": tokens.astype(np.int64),
        "token_types": (tokens == ids["image_token_id"]).astype(np.int64),
        "grids": np.array([[1, side, side]], np.int64),
        "pixels": rng.uniform(-1, 1, (side**2, config.vision.patch_dim)).astype(np.float32),
    }
