"""JSON arrays and JSON lines are indexed in one pass."""

import json

import pytest

from prism_jax import errors
from prism_jax.data import json_tables, records

ROWS = [
    {"a": 'br[a]ck{e}ts, "quotes" and \\ "'},
    {"b": [1, {"c": [[], {}, "]"]}], "d": "é漢🙂"},
    {},
    {"e": "\\\\", "f": {"g": None}},
]


def scan(path) -> list:
    table = json_tables.JsonTable(str(path))
    entries = list(table.scan())
    assert [table.read(i)[0] for i in range(len(table))] == [number for number, _ in entries]
    for i, (_, value) in enumerate(entries):
        again = table.read(i)[1]
        assert str(again) == str(value)
    return entries


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_has_the_rows_json_sees_for_any_chunk_size(
    tmp_path, monkeypatch, chunk_bytes, indent
):
    monkeypatch.setattr(json_tables, "_CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "rows.json"
    path.write_text(" \n" + json.dumps(ROWS, indent=indent, ensure_ascii=False) + "\n\n")
    if chunk_bytes < 3:  # The kind of file is told from the first chunk.
        path.write_text(path.read_text().strip() + "\n")
    assert scan(path) == list(enumerate(ROWS, start=1))


def test_lines_keep_their_line_number_when_blank_lines_stand_between(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n {"a": 2} \n{"a": 3}')
    assert scan(path) == [(1, {"a": 1}), (4, {"a": 2}), (5, {"a": 3})]


def test_files_put_together_keep_no_byte_order_mark_between_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": "\xef\xbb\xbf"}\n\xef\xbb\xbf\n')
    assert scan(path) == [(1, {"a": 1}), (2, {"a": "\ufeff"})]


def test_a_json_file_without_a_bracket_is_read_as_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert scan(path) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{'a': 1}", "malformed"),
        (b'{"a": 1', "malformed"),
        (b'{"a": "\xff"}', "not_utf8"),
        (b"[1]", "bad_type"),
        (b"3", "bad_type"),
        (b"null", "bad_type"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "malformed"),
        (b'{"a": ' + b"9" * 5000 + b"}", "malformed"),
    ],
)
def test_a_wrong_line_is_an_entry_and_its_neighbours_are_read(tmp_path, text, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + text + b'\n{"a": 2}\n')
    first, (number, wrong), last = scan(path)
    assert (first, last) == ((1, {"a": 1}), (3, {"a": 2}))
    assert number == 2
    assert isinstance(wrong, records.RowError)
    assert wrong.reason == reason


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ('[{"a": 1}, 7, "x", {"a": 2}]', [None, "bad_type", "bad_type", None]),
        ('[{"a": 1},, {"a": 2}]', [None, "malformed", None]),
        ('[{"a": 1}, {"a": 2},]', [None, None, "malformed"]),
        ('[{"a": 1} {"a": 2}]', ["malformed"]),
        ("[]", []),
        ("[ \n ]", []),
    ],
)
def test_a_wrong_element_is_an_entry(tmp_path, text, reasons):
    path = tmp_path / "rows.json"
    path.write_text(text)
    found = [value for _, value in scan(path)]
    assert [getattr(value, "reason", None) for value in found] == reasons


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a"', '[{"a": 1}', '[{"a": "x', "[{}] []", "[{}]x"])
def test_a_cut_or_continued_array_is_refused_with_the_files_name(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(errors.InputError, match=r"rows\.json"):
        scan(path)


def test_a_missing_file_is_named():
    with pytest.raises(errors.InputError, match=r"/no/such/file\.json"):
        list(json_tables.JsonTable("/no/such/file.json").scan())
