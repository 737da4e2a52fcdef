"""Heads and scores, and every fault of a checkpoint told at once."""

import pickle

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from models.hf import checkpoint as hf_checkpoint
from models.hf import names as hf_names
from prism_jax.checkpoints import pretrained
from tests import hf_checkpoints
from tests.models import hf_models

TEXT = "model.language_model."


def test_a_tied_checkpoint_that_stores_the_head_again_is_accepted(tmp_path):
    config = hf_checkpoints.config_json("dense", tied=True)
    stored = hf_checkpoints.random_tensors(hf_checkpoints.shapes(config, layout="5"))
    stored["lm_head.weight"] = stored[f"{TEXT}embed_tokens.weight"].copy()
    hf_checkpoints.write_tensors(tmp_path / "same", config, stored, num_files=2)
    assert "text.head.embedding" not in hf_checkpoint.values_by_path(
        hf_models.load(tmp_path / "same")
    )
    stored["lm_head.weight"][3, 4] += 1
    hf_checkpoints.write_tensors(tmp_path / "other", config, stored, num_files=2)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        hf_models.load(tmp_path / "other")


@pytest.mark.parametrize("kind", hf_checkpoints.KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_discriminator_goes_there_and_back_with_its_head_carried_over(tmp_path, kind, tied):
    stored = hf_checkpoints.write(tmp_path / "it", kind, tied=tied, score=True)
    state = hf_models.load(tmp_path / "it", with_score=True)
    found = hf_checkpoint.values_by_path(state)
    assert "trunk.text.head.embedding" not in found
    np.testing.assert_array_equal(found["score.kernel"], stored["v_head.1.weight"].T)
    hf_models.save(tmp_path / "back", state, tmp_path / "it")
    hf_models.same(hf_checkpoints.read(tmp_path / "back"), stored)
    if not tied:
        with pytest.raises(ValueError, match="copy_from must name a folder"):
            hf_checkpoint.save(
                tmp_path / "bare",
                state,
                hf_checkpoint.read_config(tmp_path / "it"),
                layout="5",
                max_shard_bytes=10**9,
                copy_from=None,
            )


def test_a_tied_discriminator_with_any_stored_head_is_accepted(tmp_path):
    config = hf_checkpoints.config_json("moe", tied=True)
    wanted = hf_checkpoints.shapes(config, layout="4.57")
    stored = hf_checkpoints.random_tensors(
        wanted | {"v_head.1.weight": (1, 32), "lm_head.weight": (72, 32)}
    )
    hf_checkpoints.write_tensors(tmp_path / "it", config, stored, num_files=2)
    hf_models.save(
        tmp_path / "back", hf_models.load(tmp_path / "it", with_score=True), tmp_path / "it"
    )
    del stored["lm_head.weight"]
    hf_models.same(hf_checkpoints.read(tmp_path / "back"), stored)


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_value_head_pt_is_not_opened_and_the_error_says_what_to_do(tmp_path):
    hf_checkpoints.write(tmp_path / "it", "moe")
    sprung = tmp_path / "sprung"
    (tmp_path / "it" / "value_head.pt").write_bytes(pickle.dumps(_Trap(str(sprung))))
    with pytest.raises(ValueError, match=r"value_head\.pt is a pickle.*not opened; save the disc"):
        hf_models.load(tmp_path / "it", with_score=True)
    assert not sprung.exists()


def test_a_new_score_head_stays_abstract_for_the_caller(tmp_path):
    hf_checkpoints.write(tmp_path / "it", "moe")
    found = hf_checkpoint.values_by_path(
        hf_models.load(tmp_path / "it", with_score=True, fresh=("score.kernel",))
    )
    assert isinstance(found["score.kernel"], jax.ShapeDtypeStruct)
    assert all(isinstance(v, jax.Array) for path, v in found.items() if path != "score.kernel")
    with pytest.raises(ValueError, match="fresh names parameters that the model does not have"):
        hf_models.load(tmp_path / "it", fresh=("score.kernel",))


def test_a_text_only_trunk_drops_the_tower_and_carries_it_back(tmp_path):
    stored = hf_checkpoints.write(tmp_path / "it", "dense", score=True)
    options = {"with_score": True, "text_only": True}
    with pytest.raises(ValueError, match=r"not used by the model \(\d+\): model\.visual\."):
        hf_models.load(tmp_path / "it", **options)
    state = hf_models.load(tmp_path / "it", **options, drop=("model.visual.",))
    assert not any("vision" in path for path in hf_checkpoint.values_by_path(state))
    hf_models.save(tmp_path / "back", state, tmp_path / "it", carry=("model.visual.",))
    hf_models.same(hf_checkpoints.read(tmp_path / "back"), stored)
    with pytest.raises(ValueError, match="carry names tensors that the model has itself"):
        hf_models.save(tmp_path / "twice", state, tmp_path / "it", carry=("model.",))
    with pytest.raises(ValueError, match=r"holds no tensor that begins with model\.audio"):
        hf_models.save(tmp_path / "none", state, tmp_path / "it", carry=("model.audio",))


def test_everything_that_does_not_fit_is_told_at_once(tmp_path):
    config = hf_checkpoints.config_json("dense", tied=False)
    wanted = hf_checkpoints.shapes(config, layout="4.57")
    for i in range(3):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            del wanted[f"{TEXT}layers.{i}.self_attn.{name}.weight"]
    wanted[f"{TEXT}norm.weight"] = (33,)
    wanted["model.extra"] = wanted["another.extra"] = (2,)
    stored = hf_checkpoints.random_tensors(wanted)
    stored["lm_head.weight"] = stored["lm_head.weight"].astype(np.int8)
    wide = f"{TEXT}layers.1.input_layernorm.weight"
    stored[wide] = stored[wide].astype(np.float32)
    hf_checkpoints.write_tensors(tmp_path / "it", config, stored, num_files=2)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        hf_models.load(tmp_path / "it")
    told = str(caught.value)
    assert "\n" not in told
    assert f"missing (12): {TEXT}layers.0.self_attn.k_proj.weight, " in told
    assert "and 2 more" in told
    assert "not used by the model (2): another.extra, model.extra" in told
    assert f"of another shape (1): {TEXT}norm.weight [33] instead of [32]" in told
    assert "of a type that is not loaded (1): lm_head.weight I8" in told
    assert f"of several types in one stack (1): {TEXT}layers.*.input_layernorm.weight" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (np.float64, "F64. F64 is read only where all weights are of it"),
        (np.int8, "I8. Weights of type I8 are not read: dequantize the model"),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3. Weights of type F8_E4M3 are not read: dequantize"),
    ],
)
def test_a_type_that_is_not_loaded_is_refused_with_what_to_do(tmp_path, change, told):
    config = hf_checkpoints.config_json("dense", tied=True)
    stored = hf_checkpoints.random_tensors(hf_checkpoints.shapes(config, layout="5"))
    embed = f"{TEXT}embed_tokens.weight"
    stored[embed] = stored[embed].astype(change)
    hf_checkpoints.write_tensors(tmp_path / "it", config, stored, num_files=1)
    for read in (hf_models.load, pretrained.Source.of):
        with pytest.raises(ValueError, match=f"{embed} {told}"):
            read(tmp_path / "it")


def test_a_folder_of_float64_is_read_as_float32(tmp_path):
    stored = hf_checkpoints.write(tmp_path / "it", "dense", tied=True, dtype=np.float64)
    state = hf_models.load(tmp_path / "it")
    hf_models.save(tmp_path / "back", state, tmp_path / "it")
    hf_models.same(
        hf_checkpoints.read(tmp_path / "back"),
        {name: value.astype(np.float32) for name, value in stored.items()},
    )
    assert pretrained.Source.of(tmp_path / "it").dtype == "float32"
    stored[f"{TEXT}norm.weight"][0] = 1e39
    safetensors.numpy.save_file(stored, tmp_path / "back" / "model.safetensors")
    for path in (*(tmp_path / "back").glob("model-*"), *(tmp_path / "back").glob("*index*")):
        path.unlink()
    (tmp_path / "back" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"norm\.weight holds values that are infinite as float32"):
        hf_models.load(tmp_path / "back")


def test_a_discriminator_is_no_policy(tmp_path):
    hf_checkpoints.write(tmp_path / "it", "dense", score=True)
    with pytest.raises(ValueError, match=r"not used by the model \(1\): v_head\.1\.weight"):
        hf_models.load(tmp_path / "it")


def test_a_parameter_without_a_name_is_refused():
    naming = hf_names.naming(hf_checkpoints.config_json("dense", tied=True))
    for path in ("text.layers.attn.q.lora", "text.other.kernel", "kernel"):
        with pytest.raises(ValueError, match=f"'{path}' has no name in a Hugging Face checkpoint"):
            hf_names.weight(path, (3, 4, 5), naming, "5")
