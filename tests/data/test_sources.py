"""Files and the folder built from them give the same rows in the same order."""

import json
import os
import sys

import pytest

from prism_jax import errors
from prism_jax.data import build, manifest, paths, records, sources, validate
from prism_jax.data.numerals import corpus as numerals_corpus
from tests import data_files

NUM_ROWS = 7


def write_source(folder, kind: str, ending: str) -> sources.Source:
    """Write seven rows of a kind, the fourth with a missing image or an empty prompt."""
    data_files.write_images(folder, NUM_ROWS)
    path = folder / f"rows.{ending}"
    if kind == "prompts" and ending != "parquet":
        rows = [{"prompt": f"Q{i}", "image": f"{i}.png", "answer": "5"} for i in range(NUM_ROWS)]
    else:
        make = {"sft": data_files.sft_row, "pairs": data_files.pair_row}
        rows = [make.get(kind, data_files.prompt_row)(i) for i in range(NUM_ROWS)]
    if kind == "sft":
        rows[3]["images"] = ["none.png"]
    else:
        rows[3]["prompt"] = None
    if ending == "parquet":
        data_files.write_parquet(path, rows, group_rows=3)
    elif ending == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        data_files.write_lines(path, rows)
    return sources.Source(kind=kind, path=str(path))


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", records.KINDS)
def test_a_built_folder_gives_the_rows_of_the_files_in_order(tmp_path, kind, ending):
    source = write_source(tmp_path / "raw", kind, ending)
    raw, raw_report = data_files.read_all(source, max_bad_rows=1)
    out = str(tmp_path / "built")
    told = build.build(source, out, validate.Rules(max_bad_rows=1))
    built, _ = data_files.read_all(sources.Source(kind=kind, path=out))
    assert built == raw
    assert len(raw) == NUM_ROWS - 1
    assert told.reports == {"train": raw_report.summary()}
    for row in built:
        (image,) = records.get_images(row)
        assert (image.width_pixels, image.height_pixels) == (40, 30)
    numbers = [0, 1, 2, 4, 5, 6]
    assert [records.get_images(row)[0].data for row in built] == [
        data_files.png(i) for i in numbers
    ]
    for i, row in zip(numbers, built, strict=True):
        assert str(i) in "".join(records.get_texts(row))


def test_rows_of_several_files_come_in_the_order_of_names(tmp_path):
    for name, i in (("b.jsonl", 1), ("a.jsonl", 0), ("c.json", 2)):
        data_files.write_lines(tmp_path / name, [{"prompt": f"Q{i}"}])
    (tmp_path / "notes.txt").write_text("not data")
    rows, _ = data_files.read_all(sources.Source(kind="prompts", path=str(tmp_path)))
    assert [row.id for row in rows] == ["a.jsonl:1", "b.jsonl:1", "c.json:1"]


def test_a_built_folder_is_checked_for_length_and_answers(tmp_path):
    rows = [{"prompt": "one"}, {"prompt": "one", "answer": "5"}, {"prompt": "o n e", "answer": "5"}]
    path = data_files.write_lines(tmp_path / "rows.jsonl", rows)
    out = str(tmp_path / "built")
    build.build(sources.Source(kind="prompts", path=str(path)), out, validate.Rules())
    kept, report = data_files.read_all(
        sources.Source(kind="prompts", path=out),
        need_answer=True,
        max_bad_rows=1,
        count_tokens=lambda row: len(row.prompt[0].content.split()),
        max_tokens=2,
        overlong="filter",
    )
    assert [row.id for row in kept] == ["rows.jsonl:2"]
    assert [(r.row, r.reason) for r in report.dropped] == [(1, "empty_answer"), (3, "overlong")]


def test_an_image_that_changes_after_validation_is_refused(tmp_path):
    data_files.write_images(tmp_path, 2)
    path = data_files.write_lines(tmp_path / "rows.jsonl", [data_files.sft_row(1)])
    rows = sources.open_source(
        sources.Source(kind="sft", path=str(path)), validate.Rules(), cache_dir=None
    ).rows
    assert rows[0].images[0].data == data_files.png(1)
    (tmp_path / "1.png").write_bytes(data_files.png(9))
    with pytest.raises(errors.InputError, match=r"row-1: image 1\.png has changed"):
        rows[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "chat", "path": "x.json"}, "chat"),
        ({"kind": "sft", "path": ""}, "data.path"),
        ({"kind": "sft", "path": "{tmp}/none.json"}, r"none\.json"),
        ({"kind": "sft", "path": "{tmp}/notes.txt"}, r"notes\.txt"),
        ({"kind": "sft", "path": "{tmp}/empty"}, "empty"),
        ({"kind": "sft", "path": "{tmp}/dataset_info.json"}, "data.entry"),
        ({"kind": "pairs", "path": "{tmp}", "entry": "x"}, "kind pairs"),
        ({"kind": "sft", "path": "{tmp}/a.json", "entry": "x"}, r"a\.json"),
    ],
)
def test_a_source_that_names_nothing_readable_is_refused(tmp_path, arguments, named):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    arguments["path"] = arguments["path"].format(tmp=tmp_path)
    with pytest.raises(errors.InputError, match=named):
        data_files.read_all(sources.Source(**arguments))


@pytest.mark.parametrize(
    "address", ["https://x/rows.json", "s3://b/rows.json", "file:///rows.json"]
)
def test_an_address_that_is_not_of_gs_is_refused(address):
    with pytest.raises(errors.InputError, match="must be a local path or begin with gs://"):
        data_files.read_all(sources.Source(kind="sft", path=address))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["rows.json", "rows.parquet", "build_manifest.json"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    path = tmp_path if name == manifest.FILE else tmp_path / name
    with pytest.raises(errors.InputError, match=f"{name}: must be a regular file"):
        data_files.read_all(sources.Source(kind="sft", path=str(path)))


def test_a_gs_path_without_gcsfs_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(errors.InputError, match=r"gs://bucket/rows\.json: .*extra `gcs`"):
        data_files.read_all(sources.Source(kind="sft", path="gs://bucket/rows.json"))


@pytest.mark.parametrize(
    ("path", "full"),
    [
        ("a.png", "gs://b/root/a.png"),
        ("x/../a.png", "gs://b/root/a.png"),
        ("gs://b/root/a.png", "gs://b/root/a.png"),
    ],
)
def test_a_remote_image_path_is_joined_to_its_root(path, full):
    assert paths.inside("gs://b/root/", path) == full


@pytest.mark.parametrize(
    "path", ["../a.png", "/a.png", "x/../../a.png", "gs://b/root2/a.png", "gs://b/root/../a", "a\0"]
)
def test_a_remote_image_path_stays_below_its_root(path):
    with pytest.raises(records.RowError) as caught:
        paths.inside("gs://b/root", path)
    assert caught.value.reason == "unsafe_path"


def test_a_remote_built_folder_is_copied_once_below_the_cache(tmp_path, monkeypatch):
    # The store is played by a local folder.
    path = data_files.write_lines(tmp_path / "rows.jsonl", [{"prompt": "Q"}])
    source = sources.Source(kind="prompts", path=str(path))
    out = tmp_path / "store"
    monkeypatch.setattr(paths, "is_remote", lambda name: name == str(out))
    build.build(source, str(out), validate.Rules())
    assert (out / manifest.FILE).is_file()
    remote = sources.Source(kind="prompts", path=str(out))
    with pytest.raises(errors.InputError, match=r"data\.cache_dir"):
        sources.open_source(remote, validate.Rules(), cache_dir=None)
    cache = tmp_path / "cache"
    for _ in range(2):
        opened = sources.open_source(remote, validate.Rules(), cache_dir=str(cache))
        assert opened.rows[0].prompt[0].content == "Q"
    assert len(list(cache.iterdir())) == 1


def test_every_part_of_the_embedded_corpus_is_right(tmp_path):
    names = ("base", "public", "teacher", "align", "rl_train", "rl_test")
    numerals_corpus.write(
        tmp_path / "corpus",
        level="tiny",
        seed=0,
        rows=numerals_corpus.rows_of("tiny", dict.fromkeys(names, 3)),
        slips=numerals_corpus.slips_of("tiny", {}),
        num_processes=1,
    )
    for name in names[:3]:
        entry = sources.Source(
            kind="sft", path=str(tmp_path / "corpus" / "sft"), entry=f"numerals_{name}"
        )
        rows, _ = data_files.read_all(entry)
        assert [row.messages[-1].role for row in rows] == ["assistant"] * 3
    for name, needs in (
        ("align/train", {"need_teacher": True}),
        ("rl/train", {}),
        ("rl/test", {}),
    ):
        path = tmp_path / "corpus" / f"{name}.parquet"
        rows, _ = data_files.read_all(
            sources.Source(kind="prompts", path=str(path)), need_answer=True, **needs
        )
        assert len(rows) == 3
