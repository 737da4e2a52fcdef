"""A `config.json` is read value by value: what says nothing is passed over, the rest must fit."""

import copy
import time

import pytest

from models import config as config_lib
from models.hf import check as hf_check
from models.hf import names as hf_names
from tests import hf_checkpoints

_DENSE = hf_checkpoints.config_json("dense", tied=True)


def _changed(place: str, value: object) -> dict:
    """Return the dense configuration with one value changed; dots lead into its parts."""
    config = copy.deepcopy(_DENSE)
    *parts, key = place.split("/")
    inner = config
    for part in parts:
        inner = inner[part]
    inner[key] = value
    return config


@pytest.mark.parametrize("part", ["", "text_config/", "vision_config/"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unsloth_fixed", True),
        ("unsloth_version", "2026.1.1"),
        ("auto_map", {"AutoModel": "x.Y"}),
        ("keys_to_ignore_at_inference", ["past_key_values"]),
        ("_attn_implementation", "sdpa"),
        ("transformers.js_config", {"dtype": "q4"}),
        ("quantization_config", None),
        ("quantization_config", {}),
        ("any_key_at_all", None),
        ("attention_bias", None),
        ("sliding_window", 4096),
        ("pretraining_tp", 1),
        ("hidden_act", None),
        ("num_experts", None),
        ("prism_discriminator", None),
    ],
)
def test_what_says_nothing_about_the_model_is_passed_over(part, key, value):
    assert config_lib.from_hf(_changed(part + key, value)) == config_lib.from_hf(_DENSE)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("text_config/rms_norm_eps", float("nan")),
        ("text_config/rms_norm_eps", float("inf")),
        ("text_config/rms_norm_eps", "1e-6"),
        ("text_config/rms_norm_eps", 0),
        ("text_config/rope_theta", True),
        ("text_config/rope_theta", -1.0),
        ("text_config/rope_theta", 10**400),
        ("text_config/rope_parameters", []),
        ("text_config/rope_scaling/mrope_section", [8, "4", 4]),
        ("text_config/hidden_size", True),
        ("text_config/hidden_size", 32.0),
        ("text_config/num_hidden_layers", 0),
        ("text_config/num_attention_heads", -4),
        ("text_config/vocab_size", 10**4000),
        ("text_config/initializer_range", float("nan")),
        ("text_config/quantization_config", {"quant_method": "fp8"}),
        ("text_config/an_unknown_switch", False),
        ("text_config/use_sliding_window", True),
        ("text_config/mlp_bias", True),
        ("vision_config/depth", [3]),
        ("vision_config/patch_size", [16, True]),
        ("vision_config/deepstack_visual_indexes", [0.0, 1.0]),
        ("vision_config/deepstack_visual_indexes", "01"),
        ("vision_config/num_position_embeddings", 10**400),
        ("tie_word_embeddings", "false"),
        ("image_token_id", "68"),
        ("image_token_id", -1),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("text_config", [1]),
        ("text_config/mlp_only_layers", ["x" * 9000]),
        ("vision_config/patch_size", [["x"] * 9000]),
        ("tie_word_embeddings", ["x" * 9000]),
        ("text_config/hidden_size", "9" * 9000),
    ],
)
def test_a_value_that_is_none_is_refused_by_its_place(place, value):
    with pytest.raises(ValueError, match=rf"^config.*{place.split('/')[-1]}") as caught:
        config_lib.from_hf(_changed(place, value))
    told = str(caught.value)
    assert "\n" not in told
    assert len(told) < 1000


@pytest.mark.parametrize("key", ["text_config/num_hidden_layers", "vision_config/depth"])
@pytest.mark.parametrize("layers", [1025, 10**8, 10**18])
def test_layers_that_no_model_has_cost_no_time(key, layers):
    config = _changed(key, layers)
    config["text_config"]["layer_types"] = ["full_attention"] * 3
    begun = time.process_time()
    with pytest.raises(ValueError, match="whole number between 1 and 1024"):
        config_lib.from_hf(config)
    assert time.process_time() - begun < 0.5


def test_layer_types_are_full_attention_for_each_layer():
    layers = _DENSE["text_config"]["num_hidden_layers"]
    good = _changed("text_config/layer_types", ["full_attention"] * layers)
    assert config_lib.from_hf(good) == config_lib.from_hf(_DENSE)
    for bad in (["full_attention"] * (layers - 1), ["sliding_attention"] * layers, "full", 3):
        with pytest.raises(ValueError, match="layer_types"):
            config_lib.from_hf(_changed("text_config/layer_types", bad))


@pytest.mark.parametrize("kind", hf_checkpoints.KINDS)
def test_sizes_are_compared_with_the_shapes_of_the_tensors(kind):
    config = hf_checkpoints.config_json(kind, tied=True)
    stored = hf_checkpoints.shapes(config, layout="4.57")
    names = hf_names.naming(config)

    def problems(**text):
        changed = copy.deepcopy(config)
        changed.get("text_config", changed).update(text)
        return hf_check.size_problems(config_lib.from_hf(changed), names, stored)

    assert problems() == []
    text = config.get("text_config", config)
    for key in ("vocab_size", "num_hidden_layers", "head_dim"):
        (told,) = problems(**{key: 2 * text[key]})
        assert f"{key} = {2 * text[key]}" in told
    if kind != "text":
        config["vision_config"]["depth"] += 1
        (told,) = problems()
        assert "vision_config.depth" in told
