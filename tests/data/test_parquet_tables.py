"""Parquet rows come in order and by number, over row groups."""

import os
import random
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_jax import errors
from prism_jax.data import parquet_pages, parquet_tables, records
from tests import data_files


@pytest.mark.parametrize("group_rows", [1, 3, 100])
def test_rows_by_number_equal_the_scan(tmp_path, monkeypatch, group_rows):
    monkeypatch.setattr(parquet_tables, "_BATCH_ROWS", 2)
    monkeypatch.setattr(parquet_tables, "_CACHE_BYTES", 1)
    rows = [{"a": i, "b": [{"c": str(i)}]} for i in range(7)]
    path = data_files.write_parquet(tmp_path / "rows.parquet", rows, group_rows=group_rows)
    table = parquet_tables.ParquetTable(str(path))
    assert list(table.scan()) == list(enumerate(rows, start=1))
    assert [table.read(i) for i in (6, 0, 3, 2)] == [(i + 1, rows[i]) for i in (6, 0, 3, 2)]
    assert len(table) == 7


def test_a_string_that_is_not_utf8_is_one_wrong_row(tmp_path):
    good, bad = pa.array([b"x", b"y", b"z"]), pa.array([b"x", b"\xff", b"z"])
    texts = pa.StringArray.from_buffers(3, bad.buffers()[1], bad.buffers()[2])
    pq.write_table(pa.table({"a": texts, "b": good}), tmp_path / "rows.parquet")
    rows = [row for _, row in parquet_tables.ParquetTable(str(tmp_path / "rows.parquet")).scan()]
    assert rows[0] == {"a": "x", "b": b"x"}
    assert isinstance(rows[1], records.RowError)
    assert rows[1].reason == "not_utf8"
    assert rows[2] == {"a": "z", "b": b"z"}


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html></html>", b"PAR1" + bytes(50) + b"PAR1"])
def test_a_file_that_is_no_parquet_is_named(tmp_path, content):
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(errors.InputError, match=r"rows\.parquet"):
        list(parquet_tables.ParquetTable(str(tmp_path / "rows.parquet")).scan())


def test_a_damaged_page_is_named(tmp_path):
    rows = [{"a": f"{i:05d}" * 40} for i in range(400)]
    path = data_files.write_parquet(tmp_path / "rows.parquet", rows, group_rows=400)
    content = bytearray(path.read_bytes())
    content[50:2000] = bytes(1950)
    path.write_bytes(content)
    with pytest.raises(errors.InputError, match=r"rows\.parquet"):
        list(parquet_tables.ParquetTable(str(path)).scan())


def read(table, path, **options) -> list:
    """Write a table and return what is read of it, by the scan and by number."""
    pq.write_table(table, path, **options)
    opened = parquet_tables.ParquetTable(str(path))
    rows = [row for _, row in opened.scan()]
    again = [opened.read(i)[1] for i in range(len(opened))]
    assert list(map(str, again)) == list(map(str, rows))
    return rows


def test_values_that_python_has_no_type_for_are_text_or_one_wrong_row(tmp_path):
    table = pa.table(
        {
            "a": ["x", "y"],
            "late": pa.array([10**15, 0], pa.timestamp("s")),
            "fine": pa.array([1, 2**62], pa.timestamp("ns")),
            "long": pa.array([1, 2**62], pa.duration("us")),
            "id": pa.ExtensionArray.from_storage(
                pa.uuid(), pa.array([b"x" * 16] * 2, pa.binary(16))
            ),
            "map": pa.array([[("k", 1)]] * 2, pa.map_(pa.string(), pa.int64())),
        }
    )
    rows = read(table, tmp_path / "rows.parquet", version="2.6")
    assert [row["a"] for row in rows] == ["x", "y"]
    assert str(rows[1]["fine"]).startswith("2116-02-20")
    lonely = pa.table({"a": pa.array([2**50], pa.timestamp("s"))})
    assert isinstance(read(lonely, tmp_path / "odd.parquet")[0], dict | records.RowError)


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["q"]), pa.array(["r"])], names=["prompt", "prompt"])
    with pytest.raises(errors.InputError, match="two columns have the name 'prompt'"):
        read(table, tmp_path / "rows.parquet")


def test_no_extension_type_runs_what_it_holds(tmp_path):
    ran = tmp_path / "ran"
    program = f"cposix\nsystem\n(S'touch {ran}'\ntR.".encode()
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": program,
    }
    schema = pa.schema([pa.field("a", pa.int64(), metadata=metadata)])
    assert read(pa.table({"a": [1]}, schema=schema), tmp_path / "rows.parquet") == [{"a": 1}]
    assert not ran.exists()


def repeated(value: bytes, times: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(
        pa.array([0] * times, pa.int32()), pa.array([value], pa.binary())
    )


def test_values_that_rows_share_are_held_once_and_read_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_pages, "DENSE_BYTES", 4000)
    value = os.urandom(500)
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 3, 20], pa.int32()), repeated(value, 20))
    structs = pa.StructArray.from_arrays([lists, pa.array(["p", None, "r"])], ["bytes", "path"])
    rows = read(pa.table({"a": repeated(value, 3), "b": structs}), tmp_path / "rows.parquet")
    table = parquet_tables.ParquetTable(str(tmp_path / "rows.parquet"))
    table.read(0)
    assert table._plan.as_dictionary == ("b.bytes.list.element",)
    for i, count in enumerate((1, 2)):
        assert rows[i] == {"a": value, "b": {"bytes": [value] * count, "path": ("p", None)[i]}}
    assert isinstance(rows[2], records.RowError)
    assert rows[2].reason == "row_too_big"


_BOMBS = """
import resource, sys
from prism_jax import errors
from prism_jax.data import sources, validate
usual = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        sources.open_source(
            sources.Source(kind="prompts", path=path), validate.Rules(), cache_dir=None)
    except errors.InputError as error:
        print(str(error)[:300].replace("\\n", " "))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - usual)
"""


def test_a_small_file_takes_little_memory_however_much_it_says_it_holds(tmp_path):
    values = repeated(bytes(30 << 20), 400)  # 12 GB
    lists = pa.ListArray.from_arrays(pa.array([0, 400], pa.int32()), values)
    tables = {
        "page": pa.table({"prompt": ["q"] * 9, "image": repeated(bytes(100 << 20), 9)}),
        "list": pa.table({"prompt": ["q"], "images": lists}),
    }
    paths = [str(tmp_path / f"{name}.parquet") for name in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        pq.write_table(table, path, compression="zstd")
        assert os.path.getsize(path) < 10_000
    done = subprocess.run(
        [sys.executable, "-c", _BOMBS, *paths], capture_output=True, text=True, check=True
    )
    page, row, kibibytes = done.stdout.splitlines()
    assert re.search(r"page\.parquet: row group 1, column image: a page of .* unpacks to 10", page)
    assert "row_too_big: the row has 12" in row
    assert int(kibibytes) < 500 << 10


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (pa.table({"a": [b"x" * 999] * 9}), {"use_dictionary": False}, None),
        (
            pa.table({"a": [b"x" * 999] * 9}),
            {"use_dictionary": False, "column_encoding": {"a": "DELTA_BYTE_ARRAY"}},
            "not a readable parquet file",
        ),
        (pa.table({"a": pa.array([b"x" * 999] * 9, pa.binary(999))}), {}, "9 values of 999 bytes"),
        (pa.table({"a": [[1] * 100]}), {}, "must have at most 50 values, got 100"),
        (pa.table({"a": [None] * 60}), {}, "must have at most 50 rows, got 60"),
    ],
)
def test_values_beyond_a_limit_are_refused_before_they_are_unpacked(
    tmp_path, monkeypatch, table, options, message
):
    monkeypatch.setattr(parquet_pages, "DENSE_BYTES", 2000)
    monkeypatch.setattr(parquet_pages, "_LARGEST_FIXED_BYTES", 2000)
    monkeypatch.setattr(parquet_pages, "_MOST_VALUES", 50)
    path = tmp_path / "rows.parquet"
    if message is None:
        assert read(table, path, **options) == table.to_pylist()
        return
    with pytest.raises(errors.InputError, match=rf"rows\.parquet: .*{message}"):
        read(table, path, **options)


def test_many_numbers_in_one_row_are_counted_as_python_holds_them(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_pages, "DENSE_BYTES", 5000)
    few, many = read(pa.table({"a": [[1] * 50, [1] * 100]}), tmp_path / "rows.parquet")
    assert few == {"a": [1] * 50}
    assert many.reason == "row_too_big"


@pytest.mark.parametrize("seed", range(40))
def test_damage_anywhere_is_an_input_error_or_a_row(tmp_path, seed):
    rng = random.Random(seed)
    rows = [{"a": f"{i}" * 9, "b": [{"c": i * 0.5, "d": b"xy" * i}]} for i in range(30)]
    path = data_files.write_parquet(tmp_path / "rows.parquet", rows, group_rows=11)
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 3, 30))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)
    try:
        table = parquet_tables.ParquetTable(str(path))
        for number, _ in list(table.scan()):
            table.read(number - 1)
    except errors.InputError as error:
        assert "rows.parquet" in str(error)
        assert len(str(error)) < 600
