"""A data format of the user's: a function reads it, and its rows are checked like any others."""

import pytest

from prism_jax import errors
from prism_jax.data import build, records, sources, user_tables, validate
from prism_jax.setup import corpora
from tests import data_files

_READER = '''\
import pathlib
import time

import numpy as np

print("what a reader prints goes to standard error")


def read(path):
    """Read lines of `question|answer|shade`."""
    for number, line in enumerate(pathlib.Path(path).read_text().splitlines()):
        question, answer, picture = line.split("|")
        if question == "raise":
            raise ValueError("no such question")
        if question == "hang":
            time.sleep(3600)
        if question == "list":
            yield [1, 2]
            continue
        data = (pathlib.Path(path).parent / picture).read_bytes()
        yield {
            "id": np.int64(number),
            "prompt": f"<image>{question}",
            "images": [picture if answer == "path" else {"bytes": data}],
            "answer": {1} if question == "set" else answer,
        }
'''


@pytest.fixture
def source(tmp_path):
    """Return a function that writes lines and names them with their reader."""
    data_files.write_images(tmp_path, 3)
    (tmp_path / "reader.py").write_text(_READER)

    def make(*lines):
        (tmp_path / "mine.txt").write_text("\n".join(lines))
        text = f"{tmp_path / 'mine.txt'}@{tmp_path / 'reader.py'}:read"
        return corpora.source(text, kind="prompts", image_root="")

    return make


def test_rows_of_a_reader_are_those_of_a_built_folder_and_wrong_ones_are_counted(source, tmp_path):
    mine = source("two?|2|2.png", "list||0.png", "one?|path|1.png", "set|0|0.png", "none?|0|0.png")
    rows, report = data_files.read_all(mine, max_bad_rows=2)
    assert [(row.id, row.prompt[0].content, row.ground_truth) for row in rows] == [
        ("0", "<image>two?", "2"),
        ("2", "<image>one?", "path"),
        ("4", "<image>none?", "0"),
    ]
    assert [row.images[0].data for row in rows] == [data_files.png(i) for i in (2, 1, 0)]
    assert [(str(row), row.is_wrong) for row in report.dropped] == [
        ("mine.txt row 2: bad_type: a row must be a dict, got list", True),
        ("mine.txt row 4: bad_type: a row must have JSON values and bytes: got set", True),
    ]
    build.build(mine, str(tmp_path / "built"), validate.Rules(max_bad_rows=2))
    built, _ = data_files.read_all(sources.Source(kind="prompts", path=str(tmp_path / "built")))
    assert [records.digest(row) for row in built] == [records.digest(row) for row in rows]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("raise|0|0.png", "reader.py:read after 1 rows: line 14: ValueError: no such question"),
        ("too|many|parts|here", "after 1 rows: line 12: ValueError: too many values"),
        ("hang|0|0.png", "no row for 1.0 s"),
    ],
)
def test_a_reader_that_fails_is_one_line_with_the_place(source, monkeypatch, line, told):
    monkeypatch.setattr(user_tables, "_ROW_SECONDS", 1.0 if "hang" in line else 60.0)
    with pytest.raises(errors.InputError, match=r"mine\.txt: ") as raised:
        data_files.read_all(source("two?|2|2.png", line))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_text_names_a_file_an_entry_or_a_reader(tmp_path):
    for text, path, entry, reader in (
        ("a@b/c.jsonl", "a@b/c.jsonl", None, None),
        ("d/dataset_info.json#x", "d/dataset_info.json", "x", None),
        ("a@b/c.xml@d/e.py:read_it", "a@b/c.xml", None, "d/e.py:read_it"),
    ):
        found = corpora.source(text, kind="sft", image_root="")
        assert (found.path, found.entry, found.reader) == (path, entry, reader)
    with pytest.raises(errors.InputError, match="No such file"):
        data_files.read_all(corpora.source(f"x@{tmp_path}/no.py:read", kind="sft", image_root=""))
