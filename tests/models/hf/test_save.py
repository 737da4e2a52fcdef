"""Writing checkpoint folders: whole or not at all, and what lies beside the weights."""

import json

import ml_dtypes
import numpy as np
import pytest

from models.hf import checkpoint as hf_checkpoint
from models.hf import files as hf_files
from models.hf import stream as hf_stream
from models.hf import writer as hf_writer
from tests import hf_checkpoints
from tests.models import hf_models


def test_a_written_folder_has_its_index_its_files_and_copies_of_the_sources_small_files(tmp_path):
    source = tmp_path / "it"
    stored = hf_checkpoints.write(source, "dense")
    for name in hf_writer.COPIED:
        (source / name).write_bytes(f"{name} ä".encode())
    for name in ("value_head.pt", "pytorch_model.bin", "modeling.py", "other.safetensors"):
        (source / name).write_bytes(b"not to be copied")
    hf_models.save(tmp_path / "back", hf_models.load(source), source, max_shard_bytes=20_000)
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


def test_a_changed_file_is_found_where_there_is_a_manifest(tmp_path):
    source, back = tmp_path / "it", tmp_path / "back"
    hf_checkpoints.write(source, "dense")
    hf_models.save(back, hf_models.load(source), source)
    hf_models.load(back)
    path = sorted(back.glob("*.safetensors"))[1]
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"changed since it was written \(1\): model-00002-of"):
        hf_models.load(back)
    manifest = back / "manifest.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({"sha256": {}}))
    with pytest.raises(ValueError, match=r"not listed \(\d+\): model-00001-of"):
        hf_models.load(back)
    manifest.write_text(json.dumps({"sha257": told["sha256"]}))
    with pytest.raises(ValueError, match=r"manifest\.json: sha256 must map"):
        hf_models.load(back)
    manifest.unlink()
    hf_models.load(back)


def test_a_target_that_is_not_empty_is_left_alone(tmp_path):
    hf_checkpoints.write(tmp_path / "it", "dense")
    state = hf_models.load(tmp_path / "it")
    before = {path.name: path.read_bytes() for path in (tmp_path / "it").iterdir()}
    with pytest.raises(ValueError, match="is not empty; nothing is overwritten"):
        hf_models.save(tmp_path / "it", state, tmp_path / "it")
    assert {path.name: path.read_bytes() for path in (tmp_path / "it").iterdir()} == before
    (tmp_path / "empty").mkdir()
    hf_models.save(tmp_path / "empty", state, tmp_path / "it")
    assert (tmp_path / "empty" / hf_files.INDEX).exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        hf_models.save(tmp_path / "file", state, tmp_path / "it")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        hf_models.save(tmp_path / "nowhere" / "it", state, tmp_path / "it")


def test_an_export_that_dies_leaves_no_folder_of_the_targets_name(tmp_path, monkeypatch):
    source = tmp_path / "it"
    hf_checkpoints.write(source, "dense")
    state = hf_models.load(source)
    gather, calls = hf_stream.gather, []

    def dying(*args):
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return gather(*args)

    monkeypatch.setattr(hf_stream, "gather", dying)
    with pytest.raises(KeyboardInterrupt):
        hf_models.save(tmp_path / "back", state, source)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    # A kill leaves no time to clean up: what stays has neither the name nor an index.
    calls.clear()
    monkeypatch.setattr(hf_writer.shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        hf_models.save(tmp_path / "back", state, source)
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
        hf_checkpoint.save(
            tmp_path / "back",
            hf_models.load(tmp_path / "it"),
            config,
            layout="5",
            max_shard_bytes=10**9,
            copy_from=None,
        )


def test_parts_of_one_tensor_must_have_one_type(tmp_path):
    hf_checkpoints.write(tmp_path / "it", "dense")
    state = hf_models.load(tmp_path / "it")
    query = state["vision"]["blocks"]["attn"]["q"]["kernel"]
    state["vision"]["blocks"]["attn"]["q"]["kernel"] = query.replace(query[...].astype(np.float32))
    with pytest.raises(ValueError, match=r"attn\.qkv\.weight .*one type"):
        hf_models.save(tmp_path / "back", state, tmp_path / "it")


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
