"""Upcycling: experts are the dense MLP plus seeded noise, and nothing else changes."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from models import config as config_lib
from models import inputs, positions, qwen3_vl, sharding, upcycle
from models.hf import checkpoint as hf_checkpoint
from models.hf import names as hf_names
from tests import hf_checkpoints

OPTIONS = upcycle.Options(
    num_experts=4,
    num_experts_per_token=2,
    noise_std=0.01,
    noise="absolute",
    router_std=0.02,
    seed=3,
    router="token",
    heads=1,
)
MLP = "model.language_model.layers.{}.mlp."


def _make(source, target, options=OPTIONS, layout="4.57") -> dict[str, np.ndarray]:
    upcycle.upcycle(source, target, options, layout=layout, max_shard_bytes=60_000)
    return hf_checkpoints.read(target)


@pytest.fixture
def source(tmp_path):
    hf_checkpoints.write(tmp_path / "dense", "dense", dtype=np.float32)
    return tmp_path / "dense"


def test_experts_are_the_dense_mlp_plus_noise_of_the_given_std(source, tmp_path):
    dense = hf_checkpoints.read(source)
    made = _make(source, tmp_path / "moe")
    noise = []
    for i in range(3):
        mlp = MLP.format(i)
        gate_up = made[f"{mlp}experts.gate_up_proj"]
        assert gate_up.shape == (4, 32, 56)
        assert made[f"{mlp}gate.weight"].shape == (4, 32)
        noise += [
            gate_up[:, :, :28] - dense[f"{mlp}gate_proj.weight"].T,
            gate_up[:, :, 28:] - dense[f"{mlp}up_proj.weight"].T,
            made[f"{mlp}experts.down_proj"] - dense[f"{mlp}down_proj.weight"].T,
        ]
    drawn = np.concatenate([part.reshape(4, -1) for part in noise], axis=1)  # [E, 8064]
    np.testing.assert_allclose(drawn.std(), 0.01, rtol=0.02)
    assert abs(drawn.mean()) < 5 * 0.01 / drawn.size**0.5
    # Experts, and tensors, draw independently: correlations are of order 1 / sqrt(8064).
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.06
    gates = np.stack([part.reshape(-1) for part in noise[::3]])
    assert np.abs(np.corrcoef(gates) - np.eye(3)).max() < 0.08
    routers = np.stack([made[f"{MLP.format(i)}gate.weight"] for i in range(3)])
    np.testing.assert_allclose(routers.std(), 0.02, rtol=0.15)
    assert len({layer.tobytes() for layer in routers}) == 3


def test_all_other_tensors_are_the_dense_models_own(source, tmp_path):
    dense = hf_checkpoints.read(source)
    made = _make(source, tmp_path / "moe")
    kept = {name for name in dense if ".mlp." not in name or "visual" in name}
    assert {name for name in made if ".mlp." not in name or "visual" in name} == kept
    for name in kept:
        assert made[name].tobytes() == dense[name].tobytes(), name
    moe = hf_checkpoints.config_json("moe", tied=False, moe_intermediate_size=28)
    assert {name: value.shape for name, value in made.items()} == hf_checkpoints.shapes(
        moe, layout="4.57"
    )


def test_the_same_seed_gives_the_same_bytes_in_both_layouts_and_another_seed_others(
    source, tmp_path
):
    first = _make(source, tmp_path / "a")
    again = _make(source, tmp_path / "b")
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in again.items()}
    newer = _make(source, tmp_path / "c", layout="5")
    for name, value in first.items():
        other = newer[name].swapaxes(1, 2) if ".experts." in name else newer[name]
        np.testing.assert_array_equal(value, other)
    seeded = _make(source, tmp_path / "d", dataclasses.replace(OPTIONS, seed=4))
    changed = {name for name in first if first[name].tobytes() != seeded[name].tobytes()}
    assert changed == {n for n in first if ".experts." in n or n.endswith("mlp.gate.weight")}


def test_noise_depends_on_seed_and_name_alone_not_on_the_other_tensors(tmp_path):
    hf_checkpoints.write(tmp_path / "a", "dense", dtype=np.float32)
    config = hf_checkpoints.config_json("dense", tied=False, num_hidden_layers=2)
    shapes = hf_checkpoints.shapes(config, layout="5")
    whole = hf_checkpoints.read(tmp_path / "a")
    few = {name: whole[name] for name in shapes}
    hf_checkpoints.write_tensors(tmp_path / "b", config, few, num_files=1)
    name = f"{MLP.format(0)}experts.down_proj"
    first, second = _make(tmp_path / "a", tmp_path / "a4"), _make(tmp_path / "b", tmp_path / "b4")
    assert first[name].tobytes() == second[name].tobytes()


def test_relative_noise_scales_with_the_weights_own_std():
    kernel = 5 * jax.random.normal(jax.random.key(0), (60, 50))
    common = {"num_experts": 3, "noise_std": 0.1}
    key = jax.random.key(1)
    relative = upcycle.experts(kernel, key, **common, noise="relative") - kernel
    absolute = upcycle.experts(kernel, key, **common, noise="absolute") - kernel
    np.testing.assert_allclose(absolute.std(), 0.1, rtol=0.05)
    np.testing.assert_allclose(relative, absolute * kernel.std(), rtol=0, atol=1e-5)


def test_noise_is_added_in_float32_and_rounded_once():
    kernel = jnp.full((400, 50), 1.0, jnp.bfloat16)
    made = upcycle.experts(
        kernel, jax.random.key(0), num_experts=2, noise_std=0.01, noise="absolute"
    )
    wide = upcycle.experts(
        kernel.astype(jnp.float32),
        jax.random.key(0),
        num_experts=2,
        noise_std=0.01,
        noise="absolute",
    )
    assert made.dtype == jnp.bfloat16
    np.testing.assert_array_equal(made, wide.astype(jnp.bfloat16))


def test_without_noise_the_mixture_computes_what_the_dense_model_does(tmp_path):
    hf_checkpoints.write(tmp_path / "dense", "dense", dtype=np.float32)
    _make(tmp_path / "dense", tmp_path / "moe", dataclasses.replace(OPTIONS, noise_std=0.0))
    tokens = np.random.default_rng(0).integers(0, 66, 20).astype(np.int32)
    tokens[3:9] = [66, 68, 68, 68, 68, 67]
    pixels = np.random.default_rng(1).standard_normal((16, 96)).astype(np.float32)
    types = np.where(tokens == 68, positions.IMAGE, positions.TEXT).astype(np.int32)
    example = inputs.Example(tokens=tokens, token_types=types, grids=[(1, 4, 4)], pixels=[pixels])
    rows = [[example]]
    logits = []
    for folder in ("dense", "moe"):
        config = config_lib.from_hf(hf_checkpoint.read_config(tmp_path / folder))
        graphdef, abstract = qwen3_vl.abstract(lambda config=config: _model(config))
        params = hf_checkpoint.load(tmp_path / folder, abstract, shardings=None, dtype=None)
        packing = {"config": config, "max_segments": 4, "num_vision_rows": 1}
        text = inputs.pack_text(rows, row_tokens=24, **packing)
        vision = inputs.pack_vision(rows, row_patches=16, **packing)
        logits.append(np.asarray(_logits(graphdef, params, text, vision))[0, :20])
    assert np.abs(logits[0]).max() > 0.01
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-5 * np.abs(logits[0]).max())


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, text, vision):
    model = nnx.merge(graphdef, params)
    hidden, _ = model(text, vision, implementation="xla", remat="none")
    return model.logits(hidden)


def _model(config: config_lib.Qwen3VLConfig) -> qwen3_vl.Qwen3VL:
    return qwen3_vl.Qwen3VL(
        config,
        has_head=True,
        moe_implementation="dense" if config.text.moe else None,
        rules=sharding.REPLICATED,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )


def test_the_config_says_what_the_released_script_says(source, tmp_path):
    (source / "tokenizer.json").write_text("{}")
    _make(source, tmp_path / "moe")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["model_type"] == "qwen3_vl_moe"
    assert config["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]
    assert config["image_token_id"] == 68
    assert config["tie_word_embeddings"] is False
    text = config["text_config"]
    dense = hf_checkpoint.read_config(source)["text_config"]
    added = {
        "model_type": "qwen3_vl_moe_text",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 28,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
    }
    assert text == {**dense, **added}
    assert config["vision_config"]["depth"] == 4
    found = config_lib.from_hf(config)
    assert found.text.moe.num_experts == 4
    assert (
        dataclasses.replace(found.text, moe=None)
        == config_lib.from_hf(hf_checkpoint.read_config(source)).text
    )
    assert (tmp_path / "moe" / "tokenizer.json").read_text() == "{}"


def test_the_rope_of_newer_configs_is_written_in_the_older_words(source):
    dense = hf_checkpoint.read_config(source)
    text = dense["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    made = upcycle.moe_config(dense, OPTIONS)["text_config"]
    assert "rope_parameters" not in made
    assert made["rope_theta"] == 5_000_000.0
    assert made["rope_scaling"]["mrope_section"] == [4, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 1}, "num_experts_per_token must be between 1 and num_experts = 1, got 2"),
        ({"num_experts_per_token": 0}, "num_experts_per_token must be between"),
        ({"noise_std": -0.1}, "upcycle.noise_std must be 0 or more, got -0.1"),
        ({"router_std": float("nan")}, "upcycle.router_std must be 0 or more, got nan"),
        ({"noise": "some"}, "upcycle.noise must be absolute or relative, got 'some'"),
    ],
)
def test_options_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(OPTIONS, **change)


def test_a_source_that_is_no_whole_dense_model_is_refused(source, tmp_path):
    hf_checkpoints.write(tmp_path / "moe", "moe")
    with pytest.raises(ValueError, match="only a dense qwen3_vl can be upcycled"):
        _make(tmp_path / "moe", tmp_path / "out")
    config = hf_checkpoints.config_json("dense", tied=False)
    wanted = hf_checkpoints.shapes(config, layout="5")
    del wanted[f"{MLP.format(1)}up_proj.weight"]
    stored = hf_checkpoints.random_tensors(wanted, dtype=ml_dtypes.bfloat16)
    hf_checkpoints.write_tensors(tmp_path / "part", config, stored, num_files=1)
    with pytest.raises(ValueError, match=r"missing \(1\): .*layers\.1\.mlp\.up_proj"):
        _make(tmp_path / "part", tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty"):
        _make(source, tmp_path / "moe")
    assert not (tmp_path / "out").exists()


def test_a_tied_source_that_stores_its_head_again_makes_a_mixture_without_it(tmp_path):
    config = hf_checkpoints.config_json("dense", tied=True)
    stored = hf_checkpoints.random_tensors(hf_checkpoints.shapes(config, layout="5"))
    stored[hf_names.HEAD] = stored["model.language_model.embed_tokens.weight"]
    hf_checkpoints.write_tensors(tmp_path / "dense", config, stored, num_files=1)
    assert hf_names.HEAD not in _make(tmp_path / "dense", tmp_path / "moe")
