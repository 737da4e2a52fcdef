"""Checkpoints of transformers' own classes go through the project and come back; needs torch."""

import dataclasses

import numpy as np
import pytest

from models import upcycle
from models.hf import checkpoint as hf_checkpoint
from models.hf import names as hf_names
from tests import hf_checkpoints
from tests.models import hf_models

torch = pytest.importorskip("torch", reason="live comparison with Hugging Face needs torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.torch

CLASSES = {
    "dense": transformers.Qwen3VLForConditionalGeneration,
    "moe": transformers.Qwen3VLMoeForConditionalGeneration,
    "text": transformers.Qwen3ForCausalLM,
}


def _read_strictly(folder, kind, *, unexpected=frozenset()):
    """Load a folder in the types it is stored in; no key may be missing or of another shape."""
    model, told = CLASSES[kind].from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert told["missing_keys"] == set()
    assert told["mismatched_keys"] == set()
    assert told["unexpected_keys"] == unexpected
    return model.eval()


def _save(target, state, source, layout="4.57"):
    config = hf_checkpoint.read_config(source)
    hf_checkpoint.save(
        target, state, config, layout=layout, max_shard_bytes=50_000, copy_from=source
    )


@pytest.mark.parametrize("kind", hf_checkpoints.KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_tests_own_checkpoints_are_those_of_transformers(tmp_path, kind, tied):
    hf_checkpoints.write_with_transformers(tmp_path / "theirs", kind, tied=tied)
    theirs = hf_checkpoints.read(tmp_path / "theirs")
    config = hf_checkpoints.config_json(kind, tied=tied)
    assert {name: value.shape for name, value in theirs.items()} == hf_checkpoints.shapes(
        config, layout="5"
    )


@pytest.mark.parametrize("kind", hf_checkpoints.KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_of_transformers_goes_there_and_back_bit_equal_and_loads(tmp_path, kind, tied):
    source = tmp_path / "theirs"
    hf_checkpoints.write_with_transformers(source, kind, tied=tied)
    stored = hf_checkpoints.read(source)
    original = _read_strictly(source, kind).state_dict()
    state = hf_checkpoint.load(source, hf_models.abstract(source), shardings=None, dtype=None)
    for layout in hf_names.EXPERT_LAYOUTS if kind == "moe" else ("5",):
        back = tmp_path / f"back{layout}"
        _save(back, state, source, layout)
        if layout == "5":
            written = hf_checkpoints.read(back)
            assert written.keys() == stored.keys()
            for name, value in stored.items():
                assert written[name].tobytes() == value.tobytes(), name
                assert written[name].shape == value.shape, name
        found = _read_strictly(back, kind).state_dict()
        assert found.keys() == original.keys()
        for name, value in original.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_discriminator_loads_as_the_model_with_the_score_head_left_over(tmp_path, tied):
    hf_checkpoints.write(tmp_path / "it", "moe", tied=tied, score=True)
    abstract = hf_models.abstract(tmp_path / "it", with_score=True)
    state = hf_checkpoint.load(tmp_path / "it", abstract, shardings=None, dtype=None)
    _save(tmp_path / "back", state, tmp_path / "it")
    _read_strictly(tmp_path / "back", "moe", unexpected={"v_head.1.weight"})


def test_an_upcycled_model_loads_and_without_noise_computes_what_the_dense_one_does(tmp_path):
    source = tmp_path / "dense"
    hf_checkpoints.write(source, "dense", tied=True, dtype=np.float32)
    options = upcycle.Options(
        num_experts=4,
        num_experts_per_token=2,
        noise_std=0.0,
        noise="absolute",
        router_std=0.02,
        seed=0,
        router="token",
        heads=1,
    )
    dense = _read_strictly(source, "dense")
    tokens = torch.tensor([[5, 9, 66, 68, 68, 68, 68, 67, 30, 31, 2, 7]])
    given = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == 68).int(),
        "pixel_values": torch.randn((16, 96), generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    with torch.no_grad():
        expected = dense(**given).logits
    for layout in hf_names.EXPERT_LAYOUTS:
        target = tmp_path / layout
        upcycle.upcycle(source, target, options, layout=layout, max_shard_bytes=60_000)
        mixture = _read_strictly(target, "moe")
        assert mixture.config.text_config.num_experts == 4
        assert mixture.config.text_config.num_experts_per_tok == 2
        assert mixture.config.text_config.router_aux_loss_coef == 0.01
        assert mixture.config.text_config.rope_parameters["rope_theta"] == 5_000_000.0
        assert mixture.config.text_config.rope_parameters["mrope_section"] == [4, 2, 2]
        assert mixture.config.tie_word_embeddings
        with torch.no_grad():
            found = mixture(**given).logits
        scale = expected.abs().max()
        assert scale > 0.01
        assert (found - expected).abs().max() < 1e-5 * scale
    noisy = dataclasses.replace(options, noise_std=0.01)
    upcycle.upcycle(source, tmp_path / "noisy", noisy, layout="4.57", max_shard_bytes=10**9)
    with torch.no_grad():
        other = _read_strictly(tmp_path / "noisy", "moe")(**given).logits
    assert (other - expected).abs().max() > 1e-3 * scale


def test_transformers_reads_past_what_a_discriminator_keeps_apart(tmp_path):
    source = tmp_path / "dense"
    hf_checkpoints.write(source, "dense", dtype=np.float32)
    options = upcycle.Options(
        num_experts=4,
        num_experts_per_token=2,
        noise_std=0.0,
        noise="absolute",
        router_std=0.02,
        seed=0,
        router="segment",
        heads=2,
    )
    upcycle.upcycle(source, tmp_path / "moe", options, layout="4.57", max_shard_bytes=10**9)
    apart = {"router": "segment", "heads": 2}
    assert hf_checkpoint.read_config(tmp_path / "moe")["prism_discriminator"] == apart
    assert _read_strictly(tmp_path / "moe", "moe").config.text_config.num_experts == 4


def test_a_config_of_transformers_5_can_be_upcycled(tmp_path):
    source = tmp_path / "dense"
    hf_checkpoints.write_with_transformers(source, "dense", tied=False)
    assert "rope_parameters" in hf_checkpoint.read_config(source)["text_config"]
    options = upcycle.Options(
        num_experts=3,
        num_experts_per_token=1,
        noise_std=0.1,
        noise="relative",
        router_std=0.02,
        seed=0,
        router="token",
        heads=1,
    )
    upcycle.upcycle(source, tmp_path / "moe", options, layout="4.57", max_shard_bytes=10**9)
    model = _read_strictly(tmp_path / "moe", "moe")
    assert model.dtype == torch.bfloat16
    assert model.config.text_config.rope_parameters["rope_theta"] == 5_000_000.0
