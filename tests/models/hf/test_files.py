"""A folder is checked before it is used: what is unsafe or broken is refused, and named."""

import json
import pathlib
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from models.hf import files as hf_files
from models.hf import reader as hf_reader
from tests import hf_checkpoints

NAMES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    hf_checkpoints.write(tmp_path / "it", "dense")
    return tmp_path / "it"


def _open(path: pathlib.Path) -> dict[str, hf_files.Tensor]:
    return hf_files.list_tensors(path, check_manifest=False)


def _edit_index(folder: pathlib.Path, change) -> None:
    path = folder / hf_files.INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def _file(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def test_tensors_are_those_that_the_safetensors_library_reads(folder):
    expected = hf_checkpoints.read(folder)
    with hf_reader.open_folder(folder, check_manifest=False) as reader:
        assert reader.tensors.keys() == expected.keys()
        for name, value in expected.items():
            found = reader.read(name)
            assert found.dtype == value.dtype
            assert found.shape == value.shape
            assert found.tobytes() == value.tobytes()
            assert b"".join(reader.blocks(name, 100)) == value.tobytes()


@pytest.mark.parametrize(
    ("view", "boxes"),
    [
        ((12, 10), [((0, 12), (0, 10))]),
        ((12, 10), [((0, 6), (0, 10)), ((6, 12), (0, 10))]),
        ((12, 10), [((0, 12), (0, 5)), ((0, 12), (5, 10))]),
        ((12, 10), [((3, 5), (2, 9))]),
        ((12, 10), [((0, 2), (0, 10)), ((10, 12), (0, 10))]),
        ((4, 3, 10), [((1, 3), (0, 3), (5, 10)), ((0, 4), (2, 3), (0, 5))]),
        ((4, 3, 5, 2), [((0, 4), (1, 2), (0, 5), (0, 1))]),
        ((120,), [((7, 99),)]),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 7, 40, 1 << 20])
def test_every_box_of_a_tensor_is_read_as_numpy_cuts_it(
    tmp_path, monkeypatch, view, boxes, chunk_bytes
):
    monkeypatch.setattr(hf_reader, "_CHUNK_BYTES", chunk_bytes)
    values = np.arange(120, dtype=np.float32)
    safetensors.numpy.save_file({"before": values[:3], "x": values}, tmp_path / hf_files.SINGLE)
    wants = [(box, np.full([b - a for a, b in box], -1, np.float32)) for box in boxes]
    with hf_reader.open_folder(tmp_path, check_manifest=False) as reader:
        reader.read_into("x", view, wants)
    for box, out in wants:
        cut = values.reshape(view)[tuple(slice(a, b) for a, b in box)]
        np.testing.assert_array_equal(out, cut)


@pytest.mark.parametrize(
    "name",
    ["../stolen.safetensors", "/etc/stolen.safetensors", "sub/x.safetensors", "..", "", "a\\b"],
)
def test_an_index_that_names_a_file_outside_the_folder_is_refused(folder, name):
    (folder.parent / "stolen.safetensors").write_bytes((folder / NAMES[0]).read_bytes())
    _edit_index(folder, lambda m: m.update({k: name for k, v in m.items() if v == NAMES[0]}))
    with pytest.raises(ValueError, match=r"plain name|not a safetensors file"):
        _open(folder)


def test_a_link_out_of_the_folder_is_refused(folder):
    (folder / NAMES[0]).rename(folder.parent / "elsewhere.safetensors")
    (folder / NAMES[0]).symlink_to(folder.parent / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="leads out of the folder"):
        _open(folder)


def test_the_hub_cache_with_its_links_into_blobs_is_read(folder, tmp_path):
    blobs = tmp_path / "models--o--m" / "blobs"
    snapshot = tmp_path / "models--o--m" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:x}")
    assert len(_open(snapshot)) > 10
    (snapshot / NAMES[0]).unlink()
    (snapshot / NAMES[0]).symlink_to("../../other")
    (blobs.parent / "other").write_bytes((blobs / "1").read_bytes())
    with pytest.raises(ValueError, match="leads out of the folder"):
        _open(snapshot)


def test_a_missing_file_is_named(folder):
    (folder / NAMES[1]).unlink()
    with pytest.raises(ValueError, match=f"{NAMES[1]} is missing"):
        _open(folder)


def test_an_index_entry_that_points_to_the_wrong_file_is_named(folder):
    def swap(weight_map):
        weight_map["lm_head.weight"] = next(n for n in NAMES if n != weight_map["lm_head.weight"])

    _edit_index(folder, swap)
    with pytest.raises(ValueError, match=r"named by the index, not in the file.*lm_head\.weight"):
        _open(folder)


def test_a_tensor_that_the_index_does_not_name_is_refused(folder):
    _edit_index(folder, lambda m: m.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"not named there by the index.*lm_head\.weight"):
        _open(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_refused(folder, keep):
    path = folder / NAMES[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{NAMES[0]}.*truncated"):
        _open(folder)


def test_bytes_after_the_last_tensor_are_refused(folder):
    path = folder / NAMES[0]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="too long"):
        _open(folder)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02", b"\x80\x04"])
def test_a_pickle_that_is_called_safetensors_is_not_opened(folder, start):
    (folder / NAMES[0]).write_bytes(start + b"\xff" * 500)
    with pytest.raises(ValueError, match=f"{NAMES[0]} is a pickle"):
        _open(folder)


def test_a_folder_of_pickles_alone_says_that_they_are_not_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"pytorch_model.bin are pickles and are not opened"):
        _open(tmp_path)


def test_two_sets_of_weights_in_a_folder_are_refused(folder):
    (folder / hf_files.SINGLE).write_bytes((folder / NAMES[0]).read_bytes())
    with pytest.raises(ValueError, match="holds both"):
        _open(folder)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_file(b"{"), "not JSON"),
        (_file(b"[]"), "must be a JSON object"),
        (_file(b'{"a": 1, "a": 2}'), "a key occurs twice"),
        (_file(b"[" * 200_000), "not JSON"),
        (_file({"a": []}), "malformed"),
        (_file({"a": {**F32, "more": 1}}, b"x" * 8), "malformed"),
        (_file({"a": {**F32, "dtype": "X9"}}, b"x" * 8), "unknown type 'X9'"),
        (_file({"a": {**F32, "shape": [-2]}}, b"x" * 8), "bad shape"),
        (_file({"a": {**F32, "shape": [2.0]}}, b"x" * 8), "bad shape"),
        (_file({"a": {**F32, "shape": [3]}}, b"x" * 8), "needs 12 bytes"),
        (_file({"a": F32, "b": F32}, b"x" * 8), "overlap"),
        (_file({"a": {**F32, "data_offsets": [4, 12]}}, b"x" * 12), "a gap"),
        (_file({"a": {**F32, "data_offsets": [0, 8, 9]}}, b"x" * 8), "bad shape or bad offsets"),
        (_file({"a": {**F32, "data_offsets": [0]}}, b"x" * 8), "bad shape or bad offsets"),
        (_file({"a": {**F32, "data_offsets": {}}}, b"x" * 8), "bad shape or bad offsets"),
        (_file({"a": {**F32, "dtype": []}}, b"x" * 8), "unknown type"),
        (_file({"a": {**F32, "dtype": {}}}, b"x" * 8), "unknown type"),
        (_file({"a": {**F32, "shape": 1.5}}, b"x" * 8), "bad shape"),
        (_file({"a": {**F32, "shape": None}}, b"x" * 8), "bad shape"),
        (_file({"a": {**F32, "shape": [True, 2]}}, b"x" * 8), "bad shape"),
        (_file({"a": {**F32, "shape": [2**63] * 1000}}, b"x" * 8), "bad shape"),
    ],
)
def test_a_bad_header_is_refused(tmp_path, content, message):
    (tmp_path / hf_files.SINGLE).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        _open(tmp_path)
    assert hf_files.SINGLE in str(caught.value)


def test_a_header_that_claims_gigabytes_is_refused_without_reading_them(tmp_path):
    (tmp_path / hf_files.SINGLE).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(ValueError, match="truncated or not safetensors"):
        _open(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": 1}}']
)
def test_a_bad_index_is_refused(folder, content):
    (folder / hf_files.INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=hf_files.INDEX):
        _open(folder)


def test_a_list_of_many_names_shows_ten_and_counts_the_rest():
    told = hf_files.listing({"missing": [f"n{i}" for i in range(12)], "extra": [], "bad": ["x"]})
    assert told == (
        "missing (12): n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, … and 2 more; bad (1): x"
    )


def test_types_are_those_of_the_safetensors_library(tmp_path):
    values = {
        "BF16": np.ones(3, ml_dtypes.bfloat16),
        "F16": np.ones(3, np.float16),
        "F32": np.ones(3, np.float32),
        "F64": np.ones(3, np.float64),
    }
    safetensors.numpy.save_file(values, tmp_path / hf_files.SINGLE)
    found = _open(tmp_path)
    assert {name: tensor.dtype for name, tensor in found.items()} == {k: k for k in values}
    assert {k: hf_files.DTYPES[k] for k in values} == {k: v.dtype for k, v in values.items()}


@pytest.mark.parametrize(
    ("dtype", "num_bytes"),
    [("F4", 2), ("F6_E2M3", 3), ("F8_E4M3", 4), ("F8_E8M0", 4), ("F8_E5M2FNUZ", 4), ("C64", 32)],
)
def test_the_size_of_every_type_of_the_format_is_known(tmp_path, dtype, num_bytes):
    entry = {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, num_bytes]}
    (tmp_path / hf_files.SINGLE).write_bytes(_file({"a": entry}, b"x" * num_bytes))
    assert _open(tmp_path)["a"].dtype == dtype


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named_however_it_is_read(tmp_path, dtype, value):
    most = ml_dtypes.finfo(dtype).max
    values = {"good": np.array([most, -most, 0.0, 1.0], dtype), "bad": np.ones((3, 5), dtype)}
    values["bad"][2, 1] = value
    safetensors.numpy.save_file(values, tmp_path / hf_files.SINGLE)
    with hf_reader.open_folder(tmp_path, check_manifest=False) as reader:
        assert reader.read("good").tobytes() == values["good"].tobytes()
        assert b"".join(reader.blocks("good", 9)) == values["good"].tobytes()
        part = np.empty((3, 2), dtype)
        for read in (
            lambda: reader.read("bad"),
            lambda: list(reader.blocks("bad", 9)),
            lambda: reader.read_into("bad", (3, 5), [(((0, 3), (1, 3)), part)]),
        ):
            with pytest.raises(ValueError, match=r"model\.safetensors: the weight 'bad' holds NaN"):
                read()


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_an_adapter_is_refused_with_what_to_do(folder, name):
    (folder / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=rf"holds an adapter \({name}\).*merge the adapter"):
        _open(folder)
