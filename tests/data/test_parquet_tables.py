"""Parquet rows come in order and by number, over row groups."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_jax import errors
from prism_jax.data import parquet_tables, records
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
