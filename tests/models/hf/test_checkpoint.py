"""Loading checkpoints: right values, in the right shards, bit-equal when written back."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from models import sharding
from models.hf import checkpoint as hf_checkpoint
from models.hf import names as hf_names
from models.hf import reader as hf_reader
from models.hf import stream as hf_stream
from prism_jax import mesh as mesh_lib
from tests import hf_checkpoints
from tests.models import hf_models

TEXT = "model.language_model."


@pytest.fixture(params=[700, 1 << 25], ids=["rows_of_layers", "all_at_once"])
def group_bytes(request, monkeypatch) -> int:
    monkeypatch.setattr(hf_stream, "GROUP_BYTES", request.param)
    monkeypatch.setattr(hf_stream, "_IN_FLIGHT_BYTES", request.param)
    return request.param


def test_dense_parameters_are_the_tensors_stacked_split_and_turned_round(tmp_path, group_bytes):
    stored = hf_checkpoints.write(tmp_path / "it", "dense")
    found = hf_checkpoint.values_by_path(hf_models.load(tmp_path / "it"))

    def stack(name, count):
        return np.stack([stored[name.format(i)] for i in range(count)])

    kernels = {
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    expected = {
        f"text.layers.{ours}.kernel": stack(TEXT + "layers.{}." + theirs + ".weight", 3).swapaxes(
            1, 2
        )
        for ours, theirs in kernels.items()
    }
    scales = {
        "input_norm": "input_layernorm",
        "post_norm": "post_attention_layernorm",
        "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm",
    }
    expected |= {
        f"text.layers.{ours}.scale": stack(TEXT + "layers.{}." + theirs + ".weight", 3)
        for ours, theirs in scales.items()
    }
    expected["text.embed.embedding"] = stored[TEXT + "embed_tokens.weight"]
    expected["text.norm.scale"] = stored[TEXT + "norm.weight"]
    expected["text.head.embedding"] = stored["lm_head.weight"]

    vision = "model.visual."
    patches = stored[vision + "patch_embed.proj.weight"]
    expected["vision.patch_embed.kernel"] = patches.reshape(24, 3 * 2 * 4 * 4).T
    expected["vision.patch_embed.bias"] = stored[vision + "patch_embed.proj.bias"]
    expected["vision.pos_embed.embedding"] = stored[vision + "pos_embed.weight"]
    fused = stack(vision + "blocks.{}.attn.qkv.weight", 4).reshape(4, 3, 24, 24)
    fused_bias = stack(vision + "blocks.{}.attn.qkv.bias", 4).reshape(4, 3, 24)
    for number, letter in enumerate("qkv"):
        expected[f"vision.blocks.attn.{letter}.kernel"] = fused[:, number].swapaxes(1, 2)
        expected[f"vision.blocks.attn.{letter}.bias"] = fused_bias[:, number]
    groups = [
        ("vision.blocks.", "blocks.{}.", 4, {"attn.o": "attn.proj"}),
        ("vision.blocks.mlp.", "blocks.{}.mlp.", 4, {"fc1": "linear_fc1", "fc2": "linear_fc2"}),
        ("vision.merger.", "merger.", 0, {"fc1": "linear_fc1", "fc2": "linear_fc2"}),
        (
            "vision.deepstack_mergers.",
            "deepstack_merger_list.{}.",
            2,
            {"fc1": "linear_fc1", "fc2": "linear_fc2"},
        ),
    ]
    for ours, theirs, count, linears in groups:
        for mine, name in linears.items():
            weight, bias = (f"{vision}{theirs}{name}.{leaf}" for leaf in ("weight", "bias"))
            expected[f"{ours}{mine}.kernel"] = (
                stack(weight, count).swapaxes(1, 2) if count else stored[weight].T
            )
            expected[f"{ours}{mine}.bias"] = stack(bias, count) if count else stored[bias]
    for ours, theirs, count in (
        ("vision.blocks.norm1", "blocks.{}.norm1", 4),
        ("vision.blocks.norm2", "blocks.{}.norm2", 4),
        ("vision.merger.norm", "merger.norm", 0),
        ("vision.deepstack_mergers.norm", "deepstack_merger_list.{}.norm", 2),
    ):
        for mine, leaf in (("scale", "weight"), ("bias", "bias")):
            name = f"{vision}{theirs}.{leaf}"
            expected[f"{ours}.{mine}"] = stack(name, count) if count else stored[name]

    hf_models.same({path: np.asarray(value) for path, value in found.items()}, expected)


@pytest.mark.parametrize("layout", hf_names.EXPERT_LAYOUTS)
def test_experts_of_both_layouts_become_the_same_kernels(tmp_path, layout, group_bytes):
    stored = hf_checkpoints.write(tmp_path / "it", "moe", layout=layout)
    found = hf_checkpoint.values_by_path(hf_models.load(tmp_path / "it"))
    for i in range(3):
        fused = stored[f"{TEXT}layers.{i}.mlp.experts.gate_up_proj"]
        down = stored[f"{TEXT}layers.{i}.mlp.experts.down_proj"]
        if layout == "5":
            fused, down = fused.swapaxes(1, 2), down.swapaxes(1, 2)
        gate, up = fused[:, :, :12], fused[:, :, 12:]
        router = stored[f"{TEXT}layers.{i}.mlp.gate.weight"].T
        for name, value in (("gate", gate), ("up", up), ("down", down), ("router.kernel", router)):
            np.testing.assert_array_equal(found[f"text.layers.moe.{name}"][i], value)


def test_types_are_kept_unless_one_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_stream, "GROUP_BYTES", 5000)
    config = hf_checkpoints.config_json("moe", tied=True)
    wanted = hf_checkpoints.shapes(config, layout="4.57")
    narrow = hf_checkpoints.random_tensors(wanted)
    stored = {
        name: value.astype(np.float32) if "norm" in name or ".gate." in name else value
        for name, value in narrow.items()
    }
    hf_checkpoints.write_tensors(tmp_path / "it", config, stored, num_files=1)
    state = hf_models.load(tmp_path / "it")
    found = hf_checkpoint.values_by_path(state)
    assert found["text.layers.input_norm.scale"].dtype == jnp.float32
    assert found["text.layers.moe.router.kernel"].dtype == jnp.float32
    assert found["text.layers.moe.gate"].dtype == jnp.bfloat16
    hf_models.save(tmp_path / "back", state, tmp_path / "it")
    hf_models.same(hf_checkpoints.read(tmp_path / "back"), stored)
    wide = hf_checkpoint.values_by_path(hf_models.load(tmp_path / "it", dtype=jnp.float32))
    assert {value.dtype for value in wide.values()} == {np.dtype(np.float32)}
    for path, value in wide.items():
        np.testing.assert_array_equal(value, found[path].astype(jnp.float32))


@pytest.mark.parametrize(
    ("kind", "tied", "layout"),
    [
        ("dense", False, "5"),
        ("dense", True, "4.57"),
        ("moe", False, "4.57"),
        ("moe", True, "5"),
        ("text", False, "5"),
        ("text", True, "5"),
    ],
)
def test_there_and_back_is_bit_equal(tmp_path, kind, tied, layout):
    source, back = tmp_path / "it", tmp_path / "back"
    stored = hf_checkpoints.write(source, kind, tied=tied, layout=layout)
    hf_models.save(back, hf_models.load(source), source, layout=layout)
    hf_models.same(hf_checkpoints.read(back), stored)
    assert hf_checkpoint.read_config(back) == hf_checkpoint.read_config(source)


def test_one_layout_can_be_written_as_the_other(tmp_path):
    hf_checkpoints.write(tmp_path / "a", "moe", layout="4.57")
    expected = hf_models.load(tmp_path / "a")
    hf_models.save(tmp_path / "b", expected, tmp_path / "a", layout="5")
    found = hf_models.load(tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    gate_up = hf_checkpoints.read(tmp_path / "b")[f"{TEXT}layers.0.mlp.experts.gate_up_proj"]
    assert gate_up.shape == (4, 24, 32)


@pytest.mark.parametrize(
    "sizes", [{"hidden_size": 32, "moe_intermediate_size": 16}, {"moe_intermediate_size": 32}]
)
@pytest.mark.parametrize("layout", hf_names.EXPERT_LAYOUTS)
def test_a_square_expert_is_told_by_its_partner(tmp_path, sizes, layout):
    config = hf_checkpoints.config_json("moe", tied=True, **sizes)
    stored = hf_checkpoints.random_tensors(hf_checkpoints.shapes(config, layout=layout))
    hf_checkpoints.write_tensors(tmp_path / "it", config, stored, num_files=1)
    state = hf_models.load(tmp_path / "it")
    down = stored[f"{TEXT}layers.1.mlp.experts.down_proj"]
    expected = down if layout == "4.57" else down.swapaxes(1, 2)
    np.testing.assert_array_equal(
        hf_checkpoint.values_by_path(state)["text.layers.moe.down"][1], expected
    )
    hf_models.save(tmp_path / "back", state, tmp_path / "it", layout=layout)
    hf_models.same(hf_checkpoints.read(tmp_path / "back"), stored)


def test_experts_whose_shapes_contradict_each_other_are_refused(tmp_path):
    config = hf_checkpoints.config_json("moe", tied=True)
    wanted = hf_checkpoints.shapes(config, layout="4.57")
    wanted[f"{TEXT}layers.1.mlp.experts.down_proj"] = (4, 32, 12)
    stored = hf_checkpoints.random_tensors(wanted)
    hf_checkpoints.write_tensors(tmp_path / "it", config, stored, num_files=1)
    with pytest.raises(ValueError, match=r"fit no single layout.*layers\.1\.mlp\.experts\.down"):
        hf_models.load(tmp_path / "it")


_VISION = ("vision_embed", "vision_heads", "vision_mlp")


def _rules(**mesh_axes) -> sharding.Rules:
    every = dict.fromkeys(sharding.PARAM_AXES) | mesh_axes
    return sharding.Rules(tuple(every.items()))


RULES = {
    "outputs": _rules(
        vocab="b", heads="b", kv_heads="b", mlp="b", vision_heads="b", vision_mlp="b", embed="a"
    ),
    "inputs": _rules(embed="b", mlp="a", vision_embed="b", vision_positions="a", patch="a"),
    "layers": _rules(layers="a", mlp="b", heads="b", patch="b"),
    "experts": _rules(experts="a", mlp="b", router="b"),
    "two_on_one": _rules(embed=("a", "b"), vision_embed=("b", "a")),
}


@pytest.mark.parametrize(
    ("kind", "rules", "group_bytes", "layout"),
    [
        ("dense", "outputs", 700, "4.57"),
        ("dense", "inputs", 5000, "4.57"),
        ("dense", "layers", 700, "4.57"),
        ("dense", "layers", 1 << 25, "4.57"),
        ("dense", "two_on_one", 5000, "4.57"),
        ("moe", "outputs", 1 << 25, "5"),
        ("moe", "inputs", 700, "5"),
        ("moe", "experts", 700, "4.57"),
        ("moe", "experts", 5000, "5"),
    ],
)
def test_each_device_holds_its_shard_whatever_axis_is_cut(
    tmp_path, monkeypatch, kind, rules, group_bytes, layout
):
    monkeypatch.setattr(hf_stream, "GROUP_BYTES", group_bytes)
    config = hf_checkpoints.config_json(kind, tied=False, num_hidden_layers=4)
    stored = hf_checkpoints.random_tensors(hf_checkpoints.shapes(config, layout=layout))
    hf_checkpoints.write_tensors(tmp_path / "it", config, stored, num_files=2)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    shardings = mesh_lib.param_shardings(hf_models.abstract(tmp_path / "it"), mesh, RULES[rules])
    state = hf_models.load(tmp_path / "it", shardings=shardings)
    cut = 0
    for path, value in hf_checkpoint.values_by_path(state).items():
        wanted = hf_checkpoint.values_by_path(shardings)[path]
        assert value.sharding.is_equivalent_to(wanted, value.ndim), path
        cut += not value.sharding.is_fully_replicated
    assert cut >= 4
    hf_models.save(tmp_path / "back", state, tmp_path / "it", layout=layout)
    hf_models.same(hf_checkpoints.read(tmp_path / "back"), stored)
    expected = hf_models.load(tmp_path / "it")
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_shardings_of_other_parameters_are_refused(tmp_path):
    hf_checkpoints.write(tmp_path / "it", "dense")
    hf_checkpoints.write(tmp_path / "other", "moe")
    mesh = Mesh(np.array(jax.devices()), ("a",))
    shardings = mesh_lib.param_shardings(hf_models.abstract(tmp_path / "other"), mesh, _rules())
    with pytest.raises(ValueError, match=r"shardings and parameters differ in .*layers\.mlp\.down"):
        hf_models.load(tmp_path / "it", shardings=shardings)


@pytest.mark.parametrize(
    ("cut_axis", "tensors_at_most"), [("mlp", 1.5), (None, 0.6)], ids=["rows_cut", "rows_whole"]
)
def test_the_host_holds_one_tensor_at_most_and_pieces_of_it_where_rows_are_whole(
    tmp_path, monkeypatch, cut_axis, tensors_at_most
):
    monkeypatch.setattr(hf_stream, "GROUP_BYTES", 1 << 20)
    monkeypatch.setattr(hf_reader, "_CHUNK_BYTES", 1 << 16)
    sizes = {"num_hidden_layers": 4, "intermediate_size": 1 << 16}
    config = hf_checkpoints.config_json("dense", tied=True, **sizes)
    stored = hf_checkpoints.random_tensors(hf_checkpoints.shapes(config, layout="4.57"))
    hf_checkpoints.write_tensors(tmp_path / "it", config, stored, num_files=3)
    largest = max(value.nbytes for value in stored.values())
    assert sum(value.nbytes for value in stored.values()) > 12 * largest
    del stored
    mesh = Mesh(np.array(jax.devices()[:2]), ("a",))
    abstract = hf_models.abstract(tmp_path / "it")
    rules = _rules(**({cut_axis: "a"} if cut_axis else {}))
    shardings = mesh_lib.param_shardings(abstract, mesh, rules)

    # On the CPU JAX borrows NumPy's memory now and then; on a device it copies, as here.
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, on, callback: jax.device_put(jnp.zeros(shape, jnp.bfloat16), on),
    )
    hf_checkpoint.load(tmp_path / "it", abstract, shardings=shardings, dtype=None)  # compile
    tracemalloc.start()
    try:
        hf_checkpoint.load(tmp_path / "it", abstract, shardings=shardings, dtype=None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.2 * largest <= peak < tensors_at_most * largest
