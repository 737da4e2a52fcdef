"""Loading and saving checkpoints: right values, right shards, bit-equal back, all faults told."""

import json
import pickle
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from models import hf, hf_files, hf_names, hf_reader, hf_stream, hf_writer, sharding
from tests import hf_checkpoints
from tests.models import hf_models

TEXT = "model.language_model."


def _load(folder, **options) -> nnx.State:
    abstract = hf_models.abstract(
        folder, **{k: options.pop(k) for k in ("with_score", "text_only") if k in options}
    )
    return hf.load(folder, abstract, **{"shardings": None, "dtype": None, **options})


def _save(target, state, source, **options) -> None:
    given = {"layout": "4.57", "max_shard_bytes": 30_000, "copy_from": source, **options}
    hf.save(target, state, hf.read_config(source), **given)


def _same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.fixture(params=[700, 1 << 25], ids=["rows_of_layers", "all_at_once"])
def group_bytes(request, monkeypatch) -> int:
    monkeypatch.setattr(hf_stream, "GROUP_BYTES", request.param)
    monkeypatch.setattr(hf_stream, "_IN_FLIGHT_BYTES", request.param)
    return request.param


# ---- values -------------------------------------------------------------------------------------


def test_dense_parameters_are_the_tensors_stacked_split_and_turned_round(tmp_path, group_bytes):
    stored = hf_checkpoints.write(tmp_path / "it", "dense")
    found = hf.values_by_path(_load(tmp_path / "it"))

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

    _same({path: np.asarray(value) for path, value in found.items()}, expected)


@pytest.mark.parametrize("layout", hf_names.EXPERT_LAYOUTS)
def test_experts_of_both_layouts_become_the_same_kernels(tmp_path, layout, group_bytes):
    stored = hf_checkpoints.write(tmp_path / "it", "moe", layout=layout)
    found = hf.values_by_path(_load(tmp_path / "it"))
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
    state = _load(tmp_path / "it")
    found = hf.values_by_path(state)
    assert found["text.layers.input_norm.scale"].dtype == jnp.float32
    assert found["text.layers.moe.router.kernel"].dtype == jnp.float32
    assert found["text.layers.moe.gate"].dtype == jnp.bfloat16
    _save(tmp_path / "back", state, tmp_path / "it")
    _same(hf_checkpoints.read(tmp_path / "back"), stored)
    wide = hf.values_by_path(_load(tmp_path / "it", dtype=jnp.float32))
    assert {value.dtype for value in wide.values()} == {np.dtype(np.float32)}
    for path, value in wide.items():
        np.testing.assert_array_equal(value, found[path].astype(jnp.float32))


# ---- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", hf_checkpoints.KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", hf_names.EXPERT_LAYOUTS)
def test_there_and_back_is_bit_equal(tmp_path, kind, tied, layout):
    stored = hf_checkpoints.write(tmp_path / "it", kind, tied=tied, layout=layout)
    _save(tmp_path / "back", _load(tmp_path / "it"), tmp_path / "it", layout=layout)
    _same(hf_checkpoints.read(tmp_path / "back"), stored)
    assert hf.read_config(tmp_path / "back") == hf.read_config(tmp_path / "it")


def test_one_layout_can_be_written_as_the_other(tmp_path):
    hf_checkpoints.write(tmp_path / "a", "moe", layout="4.57")
    expected = _load(tmp_path / "a")
    _save(tmp_path / "b", expected, tmp_path / "a", layout="5")
    found = _load(tmp_path / "b")
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
    state = _load(tmp_path / "it")
    down = stored[f"{TEXT}layers.1.mlp.experts.down_proj"]
    expected = down if layout == "4.57" else down.swapaxes(1, 2)
    np.testing.assert_array_equal(hf.values_by_path(state)["text.layers.moe.down"][1], expected)
    _save(tmp_path / "back", state, tmp_path / "it", layout=layout)
    _same(hf_checkpoints.read(tmp_path / "back"), stored)


def test_experts_whose_shapes_contradict_each_other_are_refused(tmp_path):
    config = hf_checkpoints.config_json("moe", tied=True)
    wanted = hf_checkpoints.shapes(config, layout="4.57")
    wanted[f"{TEXT}layers.1.mlp.experts.down_proj"] = (4, 32, 12)
    stored = hf_checkpoints.random_tensors(wanted)
    hf_checkpoints.write_tensors(tmp_path / "it", config, stored, num_files=1)
    with pytest.raises(ValueError, match=r"fit no single layout.*layers\.1\.mlp\.experts\.down"):
        _load(tmp_path / "it")


# ---- shards -------------------------------------------------------------------------------------

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
    specs = sharding.param_specs(hf_models.abstract(tmp_path / "it"), RULES[rules])
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    state = _load(tmp_path / "it", shardings=shardings)
    cut = 0
    for path, value in hf.values_by_path(state).items():
        spec = hf.values_by_path(specs)[path]
        assert value.sharding.is_equivalent_to(NamedSharding(mesh, spec), value.ndim), path
        cut += not value.sharding.is_fully_replicated
    assert cut >= 4
    _save(tmp_path / "back", state, tmp_path / "it", layout=layout)
    _same(hf_checkpoints.read(tmp_path / "back"), stored)
    expected = _load(tmp_path / "it")
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_shardings_of_other_parameters_are_refused(tmp_path):
    hf_checkpoints.write(tmp_path / "it", "dense")
    hf_checkpoints.write(tmp_path / "other", "moe")
    mesh = Mesh(np.array(jax.devices()), ("a",))
    specs = sharding.param_specs(hf_models.abstract(tmp_path / "other"), _rules())
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    with pytest.raises(ValueError, match=r"shardings and parameters differ in .*layers\.mlp\.down"):
        _load(tmp_path / "it", shardings=shardings)


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
    specs = sharding.param_specs(abstract, _rules(**({cut_axis: "a"} if cut_axis else {})))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    # On the CPU JAX borrows NumPy's memory now and then; on a device it copies, as here.
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, on, callback: jax.device_put(jnp.zeros(shape, jnp.bfloat16), on),
    )
    hf.load(tmp_path / "it", abstract, shardings=shardings, dtype=None)  # compile
    tracemalloc.start()
    try:
        hf.load(tmp_path / "it", abstract, shardings=shardings, dtype=None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.2 * largest <= peak < tensors_at_most * largest


# ---- heads and scores ---------------------------------------------------------------------------


def test_a_tied_checkpoint_that_stores_the_head_again_is_accepted(tmp_path):
    config = hf_checkpoints.config_json("dense", tied=True)
    stored = hf_checkpoints.random_tensors(hf_checkpoints.shapes(config, layout="5"))
    stored["lm_head.weight"] = stored[f"{TEXT}embed_tokens.weight"].copy()
    hf_checkpoints.write_tensors(tmp_path / "same", config, stored, num_files=2)
    assert "text.head.embedding" not in hf.values_by_path(_load(tmp_path / "same"))
    stored["lm_head.weight"][3, 4] += 1
    hf_checkpoints.write_tensors(tmp_path / "other", config, stored, num_files=2)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        _load(tmp_path / "other")


@pytest.mark.parametrize("kind", hf_checkpoints.KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_discriminator_goes_there_and_back_with_its_head_carried_over(tmp_path, kind, tied):
    stored = hf_checkpoints.write(tmp_path / "it", kind, tied=tied, score=True)
    state = _load(tmp_path / "it", with_score=True)
    found = hf.values_by_path(state)
    assert "trunk.text.head.embedding" not in found
    np.testing.assert_array_equal(found["score.kernel"], stored["v_head.1.weight"].T)
    _save(tmp_path / "back", state, tmp_path / "it")
    _same(hf_checkpoints.read(tmp_path / "back"), stored)
    if not tied:
        with pytest.raises(ValueError, match="copy_from must name a folder"):
            hf.save(
                tmp_path / "bare",
                state,
                hf.read_config(tmp_path / "it"),
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
    _save(tmp_path / "back", _load(tmp_path / "it", with_score=True), tmp_path / "it")
    del stored["lm_head.weight"]
    _same(hf_checkpoints.read(tmp_path / "back"), stored)


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
        _load(tmp_path / "it", with_score=True)
    assert not sprung.exists()


def test_a_new_score_head_stays_abstract_for_the_caller(tmp_path):
    hf_checkpoints.write(tmp_path / "it", "moe")
    found = hf.values_by_path(_load(tmp_path / "it", with_score=True, fresh=("score.kernel",)))
    assert isinstance(found["score.kernel"], jax.ShapeDtypeStruct)
    assert all(isinstance(v, jax.Array) for path, v in found.items() if path != "score.kernel")
    with pytest.raises(ValueError, match="fresh names parameters that the model does not have"):
        _load(tmp_path / "it", fresh=("score.kernel",))


def test_a_text_only_trunk_drops_the_tower_and_carries_it_back(tmp_path):
    stored = hf_checkpoints.write(tmp_path / "it", "dense", score=True)
    options = {"with_score": True, "text_only": True}
    with pytest.raises(ValueError, match=r"not used by the model \(\d+\): model\.visual\."):
        _load(tmp_path / "it", **options)
    state = _load(tmp_path / "it", **options, drop=(hf_names.VISION_PREFIX,))
    assert not any("vision" in path for path in hf.values_by_path(state))
    _save(tmp_path / "back", state, tmp_path / "it", carry=(hf_names.VISION_PREFIX,))
    _same(hf_checkpoints.read(tmp_path / "back"), stored)
    with pytest.raises(ValueError, match="carry names tensors that the model has itself"):
        _save(tmp_path / "twice", state, tmp_path / "it", carry=("model.",))
    with pytest.raises(ValueError, match=r"holds no tensor that begins with model\.audio"):
        _save(tmp_path / "none", state, tmp_path / "it", carry=("model.audio",))


# ---- faults -------------------------------------------------------------------------------------


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
        _load(tmp_path / "it")
    told = str(caught.value)
    assert "\n" not in told
    assert f"missing (12): {TEXT}layers.0.self_attn.k_proj.weight, " in told
    assert "and 2 more" in told
    assert "not used by the model (2): another.extra, model.extra" in told
    assert f"of another shape (1): {TEXT}norm.weight [33] instead of [32]" in told
    assert "of a type that is not loaded (1): lm_head.weight I8" in told
    assert f"of several types in one stack (1): {TEXT}layers.*.input_layernorm.weight" in told


def test_a_discriminator_is_no_policy(tmp_path):
    hf_checkpoints.write(tmp_path / "it", "dense", score=True)
    with pytest.raises(ValueError, match=r"not used by the model \(1\): v_head\.1\.weight"):
        _load(tmp_path / "it")


def test_a_parameter_without_a_name_is_refused():
    naming = hf_names.naming(hf_checkpoints.config_json("dense", tied=True))
    for path in ("text.layers.attn.q.lora", "text.other.kernel", "kernel"):
        with pytest.raises(ValueError, match=f"'{path}' has no name in a Hugging Face checkpoint"):
            hf_names.weight(path, (3, 4, 5), naming, "5")


# ---- writing ------------------------------------------------------------------------------------


def test_a_written_folder_has_its_index_its_files_and_copies_of_the_sources_small_files(tmp_path):
    source = tmp_path / "it"
    stored = hf_checkpoints.write(source, "dense")
    for name in hf_writer.COPIED:
        (source / name).write_bytes(f"{name} ä".encode())
    for name in ("value_head.pt", "pytorch_model.bin", "modeling.py", "other.safetensors"):
        (source / name).write_bytes(b"not to be copied")
    _save(tmp_path / "back", _load(source), source, max_shard_bytes=20_000)
    back = tmp_path / "back"
    files = sorted(path.name for path in back.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert {path.name for path in back.iterdir()} - set(files) == {
        "config.json",
        "manifest.json",
        "model.safetensors.index.json",
        *hf_writer.COPIED,
    }
    for name in hf_writer.COPIED:
        assert (back / name).read_bytes() == (source / name).read_bytes()
    index = json.loads((back / hf_files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored.values())
    assert set(index["weight_map"]) == set(stored)
    for file in files:
        header = hf_files.read_header(back / file, file)
        held = sum(tensor.num_bytes for tensor in header.values())
        assert held <= 20_000 or len(header) == 1
        raw = (back / file).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        assert json.loads(raw[8 : 8 + size])["__metadata__"] == {"format": "pt"}
        assert size % 8 == 0


def test_a_changed_file_is_found_when_the_manifest_is_checked(tmp_path):
    source = tmp_path / "it"
    hf_checkpoints.write(source, "dense")
    _save(tmp_path / "back", _load(source), source)
    _load(tmp_path / "back", check_manifest=True)
    path = sorted((tmp_path / "back").glob("*.safetensors"))[1]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    _load(tmp_path / "back")
    with pytest.raises(ValueError, match=r"changed since it was written \(1\): model-00002-of"):
        _load(tmp_path / "back", check_manifest=True)
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        _load(source, check_manifest=True)


def test_a_target_that_is_not_empty_is_left_alone(tmp_path):
    hf_checkpoints.write(tmp_path / "it", "dense")
    state = _load(tmp_path / "it")
    before = {path.name: path.read_bytes() for path in (tmp_path / "it").iterdir()}
    with pytest.raises(ValueError, match="is not empty; nothing is overwritten"):
        _save(tmp_path / "it", state, tmp_path / "it")
    assert {path.name: path.read_bytes() for path in (tmp_path / "it").iterdir()} == before
    (tmp_path / "empty").mkdir()
    _save(tmp_path / "empty", state, tmp_path / "it")
    assert (tmp_path / "empty" / hf_files.INDEX).exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        _save(tmp_path / "file", state, tmp_path / "it")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        _save(tmp_path / "nowhere" / "it", state, tmp_path / "it")


def test_an_export_that_dies_leaves_no_folder_of_the_targets_name(tmp_path, monkeypatch):
    source = tmp_path / "it"
    hf_checkpoints.write(source, "dense")
    state = _load(source)
    gather, calls = hf_stream.gather, []

    def dying(*args):
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return gather(*args)

    monkeypatch.setattr(hf_stream, "gather", dying)
    with pytest.raises(KeyboardInterrupt):
        _save(tmp_path / "back", state, source)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    # A kill leaves no time to clean up: what stays has neither the name nor an index.
    calls.clear()
    monkeypatch.setattr(hf_writer.shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        _save(tmp_path / "back", state, source)
    (left,) = [path for path in tmp_path.iterdir() if path.name != "it"]
    assert left.name.startswith(".back.partial-")
    assert not (left / "config.json").exists()
    assert not (left / hf_files.INDEX).exists()


@pytest.mark.parametrize(
    ("tied", "said", "message"),
    [(False, True, "the model has a head"), (True, False, "the model has no head")],
)
def test_a_config_that_contradicts_the_models_head_is_refused(tmp_path, tied, said, message):
    hf_checkpoints.write(tmp_path / "it", "dense", tied=tied)
    config = hf_checkpoints.config_json("dense", tied=said)
    with pytest.raises(ValueError, match=message):
        hf.save(
            tmp_path / "back",
            _load(tmp_path / "it"),
            config,
            layout="5",
            max_shard_bytes=10**9,
            copy_from=None,
        )


def test_parts_of_one_tensor_must_have_one_type(tmp_path):
    hf_checkpoints.write(tmp_path / "it", "dense")
    state = _load(tmp_path / "it")
    query = state["vision"]["blocks"]["attn"]["q"]["kernel"]
    state["vision"]["blocks"]["attn"]["q"]["kernel"] = query.replace(query[...].astype(np.float32))
    with pytest.raises(ValueError, match=r"attn\.qkv\.weight .*one type"):
        _save(tmp_path / "back", state, tmp_path / "it")


def test_wider_types_come_first_in_a_file_so_that_all_are_aligned(tmp_path):
    planned = [
        hf_writer.Planned("a", "BF16", (3,)),
        hf_writer.Planned("b", "F32", (2,)),
        hf_writer.Planned("c", "BF16", (4,)),
    ]
    assert [[t.name for t in s] for s in hf_writer.shards(planned, 100)] == [["b", "a", "c"]]
    assert [[t.name for t in s] for s in hf_writer.shards(planned, 14)] == [["b", "a"], ["c"]]
    assert [[t.name for t in s] for s in hf_writer.shards(planned, 1)] == [["a"], ["b"], ["c"]]
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, got 0"):
        hf_writer.shards(planned, 0)


def test_a_type_that_checkpoints_do_not_have_is_refused():
    assert hf_writer.dtype_name(np.dtype(ml_dtypes.bfloat16), "x") == "BF16"
    with pytest.raises(ValueError, match=r"text\.norm\.scale has the type float64"):
        hf_writer.dtype_name(np.dtype(np.float64), "text.norm.scale")
