"""Real sizes, without making a single array."""

import jax.numpy as jnp
import pytest
from flax import nnx

from models import discriminator, presets, qwen3_vl, sharding


def _count(config, make=qwen3_vl.Qwen3VL, **extra) -> int:
    _, params = qwen3_vl.abstract(
        lambda: make(
            config,
            moe_implementation="ragged" if config.text.moe else None,
            rules=sharding.REPLICATED,
            dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16,
            rngs=nnx.Rngs(0),
            **extra,
        )
    )
    return qwen3_vl.num_parameters(params)


# Counted from transformers' classes on the meta device.
@pytest.mark.parametrize(
    ("preset", "millions"),
    [("QWEN3_VL_2B", 2127.5), ("QWEN3_VL_4B", 4437.8), ("QWEN3_VL_8B", 8767.1)],
)
def test_dense_models_have_the_published_number_of_parameters(preset, millions):
    count = _count(presets.__dict__[preset], has_head=True)
    assert round(count / 1e6, 1) == millions


def test_the_discriminator_has_5_299_billion_parameters():
    count = _count(presets.DISCRIMINATOR_2B_MOE4X, discriminator.Discriminator)
    assert round(count / 1e9, 3) == 5.299


def _hub_json(config) -> dict:
    """Write a preset as the `config.json` that transformers reads."""
    text, vision = config.text, config.vision
    values = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    if text.moe:
        values |= {
            "num_experts": text.moe.num_experts,
            "num_experts_per_tok": text.moe.num_experts_per_token,
            "moe_intermediate_size": text.moe.intermediate_size,
        }
    return {
        "model_type": "qwen3_vl_moe" if text.moe else "qwen3_vl",
        "tie_word_embeddings": text.tie_word_embeddings,
        "text_config": values,
        "vision_config": {
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "depth": vision.num_layers,
            "num_heads": vision.num_heads,
            "out_hidden_size": vision.out_hidden_size,
            "deepstack_visual_indexes": list(vision.deepstack_layers),
        },
    }


@pytest.mark.torch
@pytest.mark.parametrize(
    "preset",
    [
        "QWEN3_VL_2B",
        "QWEN3_VL_4B",
        "QWEN3_VL_8B",
        "QWEN3_VL_32B",
        "QWEN3_VL_30B_A3B",
        "QWEN3_VL_235B_A22B",
        "DISCRIMINATOR_2B_MOE4X",
    ],
)
def test_parameter_counts_equal_transformers_on_the_meta_device(preset):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = presets.__dict__[preset]
    with torch.device("meta"):
        built = transformers.AutoModelForImageTextToText.from_config(
            transformers.AutoConfig.for_model(**_hub_json(config))
        )
    built.tie_weights()
    theirs = sum(p.numel() for p in built.parameters())
    assert _count(config, has_head=True) == theirs
