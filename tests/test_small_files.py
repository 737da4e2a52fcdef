"""The project's own small files: whole, durable, and damage is one line that names the file."""

import json
import os
import pathlib

import pytest

from prism_jax import errors, small_files
from prism_jax.checkpoints import checkpoint
from prism_jax.commands.ask import parts as ask_parts
from prism_jax.report import results
from prism_jax.running import metric_writers
from prism_jax.teacher import cache, reply

_SCHEMA = {
    "name": str,
    "count": int,
    "share": float,
    "note?": (str, type(None)),
    "rows": [{"step": int, str: small_files.NUMBER}],
    "kind": frozenset({"a", "b"}),
    "free": None,
}
_GOOD = {"name": "é", "count": 3, "share": 1, "rows": [], "kind": "a", "free": [1, {}]}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"note": None, "more": 5},
        {"note": "x"},
        {"rows": [{"step": 1, "loss": "NaN"}, {"step": 2, "loss": -0.5}]},
        {"share": -1e299},
    ],
)
def test_a_value_that_fits_its_schema_is_returned(tmp_path, change):
    path = tmp_path / "deep" / "file.json"
    small_files.write(path, _GOOD | change)
    assert small_files.read(path, _SCHEMA) == _GOOD | change
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"count": True}, "count must be int, got True"),
        ({"count": 3.0}, "count must be int, got 3.0"),
        ({"count": 10**30}, "count must be int"),
        ({"share": float("nan")}, "share must be a number, got nan"),
        ({"share": 10**400}, "share must be a number"),
        ({"share": "NaN"}, "share must be a number"),
        ({"name": None}, "name must be str, got None"),
        ({"note": 3}, "note must be str"),
        ({"rows": {}}, "rows must be a list, got dict"),
        ({"rows": [{}]}, r"rows\[\]\.step is missing"),
        ({"rows": [{"step": 1, "loss": "nan"}]}, r"rows\[\]\.loss must be a number, got 'nan'"),
        ({"kind": "c"}, "kind must be one of a, b, got 'c'"),
        ({"kind": ["a"]}, "kind must be one of"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_file(tmp_path, change, told):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(_GOOD | change))
    with pytest.raises(errors.InputError, match=rf"file\.json: damaged: {told}") as caught:
        small_files.read(path, _SCHEMA)
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\0\0\0", b"\xff\xfe", b"[]", b"{}", b"3", b"null", b'"\\ud800"'),
        *(b"[" * 10**5, b'{"a":' * 10**5, b"9" * 5000),
    ],
)
@pytest.mark.parametrize("reader", ["finished", "identity", "metrics", "step", "reply", "cut"])
def test_damage_to_a_file_is_one_line_that_names_it(tmp_path, content, reader):
    names = {
        "finished": "finished.json",
        "identity": "run.json",
        "metrics": "sft/metrics.jsonl",
        "step": "steps/sft.json",
        "reply": "00/00aa.json",
        "cut": "metrics.jsonl",
    }
    path = tmp_path / names[reader]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content + (b"\n" if path.suffix == ".jsonl" else b""))
    calls = {
        "finished": lambda: checkpoint.finished(str(tmp_path)),
        "identity": lambda: ask_parts.recorded_step(tmp_path),
        "metrics": lambda: results.read(tmp_path),
        "step": lambda: results.read(tmp_path),
        "reply": lambda: cache.Cache(tmp_path).get("00aa"),
        "cut": lambda: metric_writers.cut_after(path, 1),
    }
    with pytest.raises(errors.InputError) as caught:
        calls[reader]()
    told = str(caught.value)
    assert path.name in told and "\n" not in told and len(told) < 500


def test_a_file_that_is_not_there_is_none_and_one_that_cannot_be_read_is_named(tmp_path):
    assert small_files.read(tmp_path / "nothing.json", _SCHEMA) is None
    assert small_files.read_lines(tmp_path / "nothing.jsonl", _SCHEMA) == []
    for read in (small_files.read, small_files.read_lines):
        with pytest.raises(errors.InputError, match=f"{tmp_path}: cannot be read: Is a directory"):
            read(tmp_path, _SCHEMA)


def test_half_of_a_character_pair_is_written_and_comes_back(tmp_path):
    value = {"model": "\ud800", "\udfff": ["é", "😀"]}
    small_files.write(tmp_path / "report.json", value)
    assert json.loads((tmp_path / "report.json").read_bytes().decode()) == value


def test_content_and_name_are_on_the_disk_before_the_old_file_goes(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_text("old")
    events = []
    fsync, replace = os.fsync, pathlib.Path.replace

    def noted_fsync(descriptor):
        name = pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        events.append(("sync", name))
        fsync(descriptor)

    def noted_replace(self, target):
        events.append(("replace", self.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(pathlib.Path, "replace", noted_replace)
    small_files.replace(path, b"new")
    partial = "file.json.partial"
    assert events == [("sync", partial), ("replace", partial), ("sync", tmp_path.name)]
    assert path.read_bytes() == b"new"


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("old")

    def rows():
        yield {"a": 1}
        raise errors.InputError("no more")

    with pytest.raises(errors.InputError):
        ask_parts.write_lines(path, rows())
    assert path.read_text() == "old"


def test_a_reply_without_a_text_that_was_noted_wrongly_is_named(tmp_path):
    kept = cache.Cache(tmp_path)
    kept.put_unusable(model="m", usage=reply.Usage(input_tokens=3, output_tokens=4))
    with (tmp_path / "unusable.jsonl").open("ab") as file:
        file.write(b'{"asked_model": "m", "usa\n')  # of a killed process
    assert [usage.output_tokens for usage in kept.usages(model="m")] == [4]
    with (tmp_path / "unusable.jsonl").open("ab") as file:
        file.write(b'{"asked_model": "m", "usage": 3}\n')
    with pytest.raises(errors.InputError, match=r"unusable\.jsonl: line 3: damaged: usage must"):
        list(kept.usages(model="m"))
