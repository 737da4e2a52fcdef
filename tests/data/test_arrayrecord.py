"""Stored rows come back equal, in order, in whole shards, and damage is named."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from prism_jax import errors
from prism_jax.data import arrayrecord, build, manifest, records, sources, tfds_builders, validate
from tests import data_files

IMAGES = tuple(
    records.Image(
        path=f"{i}.png",
        data=bytes([0, i, 255]),
        sha256="ab",
        width_pixels=3 + i,
        height_pixels=4,
        scale=(None, records.Scale(min_pixels=5000, max_pixels=2**31 - 1))[i],
    )
    for i in range(2)
)
VIDEOS = (
    records.Video(
        files=IMAGES, is_list=True, frames_per_second=2.0, sampled_per_second=0.5, num_frames=2
    ),
    records.Video(files=IMAGES[:1], is_list=False, frames_per_second=29.97, num_frames=9),
)
TURNS = (
    records.Message(role="user", content="<image><image>Q é漢🙂\0"),
    records.Message(role="assistant", content="", is_learned=False),
)
PAIR = {
    "teacher_caption": None,
    "student_caption": None,
    "teacher_cot": None,
    "student_cot": None,
    "teacher_response": "T",
    "student_response": "S",
}


def sft(i: int) -> records.SFTRow:
    return records.SFTRow(
        id=str(i), source="s", messages=TURNS, images=IMAGES[: i % 3], videos=VIDEOS[: i % 3]
    )


def pair(i: int) -> records.PairRow:
    return records.PairRow(
        id=str(i),
        source="s",
        prompt="Q",
        image=IMAGES[0] if i % 2 else None,
        video=VIDEOS[i % 2],
        **PAIR,
    )


def prompt(i: int) -> records.PromptRow:
    return records.PromptRow(
        id=str(i),
        source="s",
        prompt=TURNS[:1],
        images=IMAGES[: i % 3],
        videos=VIDEOS[i % 3 :],
        teacher_response=None,
        teacher_caption="c",
        teacher_cot="t",
        data_source=None,
        ground_truth="5" if i % 2 else None,
        equivalent_answers=("a", "b")[: i % 3],
        extra_info={"index": i, "nested": {"z": [1, None, 2.5], "a": "é"}},
    )


MAKE = {"sft": sft, "pairs": pair, "prompts": prompt}


@pytest.mark.parametrize("shard_bytes", [1, 1000, 1 << 20])
@pytest.mark.parametrize("kind", records.KINDS)
def test_rows_come_back_equal_and_in_order_from_any_number_of_shards(
    tmp_path, monkeypatch, kind, shard_bytes
):
    monkeypatch.setattr(tfds_builders, "_SHARD_BYTES", shard_bytes)
    rows = [MAKE[kind](i) for i in range(13)]
    splits = {"train": iter(rows), "test": iter(rows[:2])}
    folder = tfds_builders.write(splits, kind=kind, folder=str(tmp_path))
    stored, test = (
        arrayrecord.StoredRows(folder, kind=kind, split=split, splits=splits) for split in splits
    )
    assert [test[i] for i in range(len(test))] == rows[:2]
    assert [stored[i] for i in range(len(stored))] == rows
    assert stored[np.int64(4)] == rows[4]
    num_shards = len(list(pathlib.Path(folder).glob("*-train.array_record-*")))
    assert num_shards == {1: 13, 1 << 20: 1}.get(shard_bytes, num_shards)


def test_tfds_finds_a_built_folder_and_its_splits_by_name(tmp_path):
    data_files.write_images(tmp_path, 3)
    given = {}
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        rows = [data_files.sft_row(i) for i in numbers]
        path = data_files.write_lines(tmp_path / f"{split}.jsonl", rows)
        given[split] = sources.Source(kind="sft", path=str(path))
    data_dir = str(tmp_path / "data")
    out = f"{data_dir}/prism_sft/mine/{tfds_builders.PrismSft.VERSION}"
    build.build(given["train"], out, validate.Rules(), also={"test": given["test"]})
    shutil.copytree(out, f"{data_dir}/prism_sft/{tfds_builders.PrismSft.VERSION}")
    for name in ("prism_sft", "prism_sft/mine"):
        assert sorted(tfds.builder(name, data_dir=data_dir).info.splits) == ["test", "train"]
        for split, ids in (("train", [b"row-0", b"row-1"]), ("test", [b"row-2"])):
            rows = tfds.data_source(name, split=split, data_dir=data_dir)
            assert [row["id"] for row in rows] == ids
        assert rows[0]["messages"]["content"][0] == "<image>\nWhat number, é 2?".encode()
        assert rows[0]["images"]["data"] == [data_files.png(2)]
    # Without this project TFDS reads the folder's own features.
    program = f"""
import sys
import tensorflow_datasets as tfds
for name in ("prism_sft", "prism_sft/mine"):
    rows = tfds.data_source(name, split="train", data_dir={data_dir!r})
    assert [row["id"] for row in rows] == [b"row-0", b"row-1"]
assert not {{"tensorflow", "prism_jax"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    # A stage names a split, and reads `train` without.
    for entry, ids in ((None, ["row-0", "row-1"]), ("test", ["row-2"])):
        rows, _ = data_files.read_all(sources.Source(kind="sft", path=out, entry=entry))
        assert [row.id for row in rows] == ids
    with pytest.raises(errors.InputError, match=r"has no split dev; name one of train, test as"):
        data_files.read_all(sources.Source(kind="sft", path=out, entry="dev"))


def test_a_registered_builder_without_a_folder_says_what_writes_one(tmp_path):
    with pytest.raises(errors.InputError, match="data build --kind=prompts"):
        tfds.data_source("prism_prompts", split="train", data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["", "a/b", "../x", "all", "1", "a-b", "a.b"])
def test_a_split_has_a_plain_name(tmp_path, name):
    data_files.write_images(tmp_path, 1)
    path = data_files.write_lines(tmp_path / "rows.jsonl", [data_files.sft_row(0)])
    source = sources.Source(kind="sft", path=str(path))
    with pytest.raises(errors.InputError, match="a split's name must be letters"):
        build.build(source, str(tmp_path / "out"), validate.Rules(), split=name)
    assert not (tmp_path / "out").exists()


def test_an_error_while_rows_are_made_leaves_no_folder_and_passes_through(tmp_path):
    def rows():
        yield sft(0)
        raise errors.InputError("row 2 is wrong")

    with pytest.raises(errors.InputError, match="row 2 is wrong"):
        tfds_builders.write({"train": rows()}, kind="sft", folder=str(tmp_path))
    assert not list(tmp_path.rglob("*record*"))


def build_prompts(folder, rows, **rules) -> str:
    """Build JSON lines of prompts; return the folder."""
    path = data_files.write_lines(folder / "rows.jsonl", rows)
    out = str(folder / "built")
    build.build(sources.Source(kind="prompts", path=str(path)), out, validate.Rules(**rules))
    return out


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


ROWS = [{"prompt": f"Q{i}", "answer": str(i)} for i in range(20)]


def test_two_builds_of_one_source_have_the_same_bytes(tmp_path):
    first = build_prompts(tmp_path / "a", [*ROWS, {}], max_bad_rows=1)
    second = build_prompts(tmp_path / "b", [*ROWS, {}], max_bad_rows=1)
    assert files(first) == files(second)
    assert str(tmp_path).encode() not in b"".join(files(first).values())


def test_the_manifest_counts_names_and_lists_what_was_dropped(tmp_path):
    out = build_prompts(tmp_path, [*ROWS, {"prompt": ""}], max_bad_rows=1)
    told = manifest.verify(out)
    assert (told.kind, told.splits, told.sources) == ("prompts", {"train": 20}, ["rows.jsonl"])
    assert told.reports["train"]["dropped_by_reason"] == {"empty_prompt": 1}
    dropped = (pathlib.Path(out) / "dropped.jsonl").read_text()
    assert '"row": 21' in dropped
    assert set(told.files) == set(files(out)) - {manifest.FILE}


def test_too_many_wrong_rows_leave_nothing_behind(tmp_path):
    with pytest.raises(errors.InputError, match="1 of 21 rows are wrong"):
        build_prompts(tmp_path, [*ROWS, {"prompt": ""}])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_existing_folder_is_not_replaced(tmp_path):
    out = build_prompts(tmp_path, ROWS)
    before = files(out)
    with pytest.raises(errors.InputError, match="built: must not exist"):
        build_prompts(tmp_path, ROWS[:5])
    assert files(out) == before


def test_a_build_killed_before_its_end_leaves_no_data_set(tmp_path):
    path = data_files.write_lines(tmp_path / "rows.jsonl", ROWS)
    program = f"""
import os
from prism_jax.data import build, manifest, sources, validate
manifest.write = lambda *a, **k: os._exit(9)
build.build(sources.Source(kind="prompts", path={str(path)!r}), {str(tmp_path / "built")!r},
            validate.Rules())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 9, done.stderr
    assert not (tmp_path / "built").exists()
    build_prompts(tmp_path, ROWS)
    assert (
        len(data_files.read_all(sources.Source(kind="prompts", path=str(tmp_path / "built")))[0])
        == 20
    )


def test_neither_building_nor_reading_imports_tensorflow_or_prints_to_stdout(tmp_path):
    path = data_files.write_lines(tmp_path / "rows.jsonl", ROWS)
    program = f"""
import sys
from prism_jax.data import build, sources, validate
out = {str(tmp_path / "built")!r}
build.build(sources.Source(kind="prompts", path={str(path)!r}), out, validate.Rules())
opened = sources.open_source(
    sources.Source(kind="prompts", path=out), validate.Rules(), cache_dir=None)
assert opened.rows[3].ground_truth == "3"
assert not {{"tensorflow", "torch"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr


def shard(out: str) -> pathlib.Path:
    (path,) = pathlib.Path(out).glob("*.array_record-*")
    return path


def open_prompts(out: str) -> sources.Rows:
    source = sources.Source(kind="prompts", path=out)
    return sources.open_source(source, validate.Rules(), cache_dir=None).rows


def test_a_cut_or_missing_shard_is_named_before_training(tmp_path):
    out = build_prompts(tmp_path, ROWS)
    path = shard(out)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(errors.InputError, match=path.name):
        open_prompts(out)
    path.unlink()
    with pytest.raises(errors.InputError, match=f"{path.name}: .* got None"):
        open_prompts(out)


def test_verify_and_reading_detect_a_flipped_bit(tmp_path):
    out = build_prompts(tmp_path, ROWS)
    path = shard(out)
    content = bytearray(path.read_bytes())
    content[500] ^= 1  # Inside the second record; they are compressed.
    path.write_bytes(content)
    with pytest.raises(errors.InputError, match="sha256"):
        manifest.verify(out)
    rows = open_prompts(out)
    with pytest.raises(errors.InputError, match="damaged"):
        [rows[i] for i in range(len(rows))]


def test_a_folder_of_another_kind_is_refused(tmp_path):
    out = build_prompts(tmp_path, ROWS)
    with pytest.raises(errors.InputError, match="kind sft, got prompts"):
        data_files.read_all(sources.Source(kind="sft", path=out))


@pytest.mark.parametrize(
    "change",
    [
        "",
        "[]",
        "[" * 100_000,
        "{}",
        {"version": 1},
        {"kind": 1},
        {"kind": None},
        {"splits": {"train": "20"}},
        {"splits": {"../train": 20}},
        {"splits": {}},
        {"reports": []},
        {"files": ""},
        {"files": {"a": 1}},
        {"files": {"a": {}}},
        {"files": {"a": {"bytes": True, "sha256": ""}}},
        {"files": {"../a": {"bytes": 1, "sha256": ""}}},
        {"files": {"..": {"bytes": 1, "sha256": ""}}},
        {"files": {"": {"bytes": 1, "sha256": ""}}},
        {"files": {}},
        {"more": 1},
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path, change):
    out = build_prompts(tmp_path, ROWS)
    path = pathlib.Path(out) / manifest.FILE
    if not isinstance(change, str):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(change)
    with pytest.raises(errors.InputError, match=r"build_manifest\.json|has no split train"):
        open_prompts(out)


def list_again(out: str) -> None:
    """Write the manifest's list of files anew, as whoever changed one of them would."""
    path = pathlib.Path(out) / manifest.FILE
    content = json.loads(path.read_text())
    content["files"] = {
        file.name: {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in pathlib.Path(out).iterdir()
        if file != path
    }
    path.write_text(json.dumps(content))


def test_no_name_in_a_folder_chooses_a_class(tmp_path, monkeypatch):
    out = build_prompts(tmp_path, ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stranger.py").write_text("raise SystemExit('ran')")
    features = pathlib.Path(out) / "features.json"
    known = features.read_text()
    for name in ("stranger.Text", "tensorflow_datasets.core.features.image_feature.Image"):
        content = json.loads(known)
        content["featuresDict"]["features"]["id"]["pythonClassName"] = name
        features.write_text(json.dumps(content))
        list_again(out)
        with pytest.raises(
            errors.InputError, match=r"features\.json: must be the file that `data build`"
        ):
            open_prompts(out)
    # What else TFDS would read is not read at all.
    features.write_text(known)
    (pathlib.Path(out) / "dataset_info.json").write_text("")
    list_again(out)
    assert open_prompts(out)[3].ground_truth == "3"
    assert "stranger" not in sys.modules


@pytest.mark.parametrize("name", ["payload.py", ".hidden", "folder/x"])
def test_files_that_the_manifest_does_not_list_are_refused(tmp_path, name):
    out = build_prompts(tmp_path, ROWS)
    path = pathlib.Path(out, name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    with pytest.raises(errors.InputError, match=f"does not list: {name.split('/')[0]}"):
        open_prompts(out)


def test_records_of_other_features_and_missing_shards_are_one_line(tmp_path):
    out = build_prompts(tmp_path, ROWS)
    path = shard(out)
    other = tfds_builders.write(
        {"train": [sft(1)] * 20}, kind="sft", folder=str(tmp_path / "other")
    )
    path.write_bytes(shard(other).read_bytes())
    list_again(out)
    with pytest.raises(errors.InputError, match="row 1 is damaged"):
        open_prompts(out)[0]
    path.rename(path.with_name(path.name.replace("00000-of-00001", "00000-of-00002")))
    list_again(out)
    with pytest.raises(errors.InputError, match="must hold prism_prompts-train"):
        open_prompts(out)


def test_what_a_stage_reads_of_a_folder_is_checked_again(tmp_path):
    good = prompt_of(tmp_path, data_files.png(1))
    rules = validate.Rules(count_tokens=lambda row: 1, max_tokens=9)
    cases = (
        (good, None, ""),
        (dataclasses.replace(good, images=()), "rows are wrong", "placeholders"),
        (_with_text(good, "<image><|im_end|>"), "rows are wrong", "special_token"),
        (_with_image(good, data=data_files.png(2)), "a picture is damaged", "row 1"),
        (_with_video(good, num_frames=9), "is damaged", "video 1 must have 9 files, got 2"),
        (_with_video(good, is_list=False), "is damaged", "video 1 must have 1 files, got 2"),
        (_with_video(good, files=(), num_frames=0), "is damaged", "must have 0 files, got 0"),
        (_with_image(good, width_pixels=10**5, height_pixels=10**5), "rows are wrong", "bad_image"),
    )
    for number, (row, told, named) in enumerate(cases):
        folder = tfds_builders.write(
            {"train": [row]}, kind="prompts", folder=str(tmp_path / str(number))
        )
        report = validate.Report(name="x", num_kept=1)
        manifest.write(folder, kind="prompts", reports={"train": report}, sources=[])
        source = sources.Source(kind="prompts", path=folder)
        if told is None:
            opened = sources.open_source(source, rules, cache_dir=None)
            assert opened.report.digests == records.digest(row)
            continue
        with pytest.raises(errors.InputError, match=f"{told}.*{named}|{named}.*{told}"):
            sources.open_source(source, rules, cache_dir=None)


def prompt_of(folder, data: bytes) -> records.PromptRow:
    folder.joinpath("0.png").write_bytes(data)
    path = data_files.write_lines(folder / "one.jsonl", [{"prompt": "Q", "image": "0.png"}])
    (row,), _ = data_files.read_all(sources.Source(kind="prompts", path=str(path)))
    return row


def _with_text(row, text):
    return dataclasses.replace(row, prompt=(records.Message(role="user", content=text),))


def _with_video(row, **changes):
    row = _with_text(row, "<image><video>")
    return dataclasses.replace(row, videos=(dataclasses.replace(VIDEOS[0], **changes),))


def _with_image(row, **changes):
    return dataclasses.replace(row, images=(dataclasses.replace(row.images[0], **changes),))
