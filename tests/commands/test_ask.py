"""Prompts are opened: each row has its own size, whatever else the file holds."""

import json

import pytest

from prism_jax import errors
from prism_jax.data import encode, processor, records
from prism_jax.setup import prompts as prompts_lib
from tests import data_files, tiny_checkpoint

_OPTIONS = {
    "image_root": None,
    "cache_dir": None,
    "max_rows": None,
    "max_prompt_tokens": 200,
    "overlong": "filter",
    "max_bad_rows": 1,
    "min_pixels": None,
    "max_pixels": None,
    "limit_image_pixels": 60_000_000,
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return processor.Processor.from_folder(
        tiny_checkpoint.write(tmp_path_factory.mktemp("sampled") / "model")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for width in (64, 128):
        picture = data_files.encoded(data_files.Image.new("RGB", (width, 64)), "PNG")
        (folder / f"{width}.png").write_bytes(picture)
    return folder


def _row(row_id, text, *images):
    return {"id": row_id, "prompt": text, "images": list(images), "answer": "7"}


def _open(folder, words, rows, *, workdir=None, check=None, **changes):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = prompts_lib.Prompts(**(_OPTIONS | {"path": str(path)} | changes))
    return prompts_lib.open_prompts(
        [options.path],
        options,
        words,
        need_teacher=False,
        need_answer=True,
        folder=workdir,
        check=check,
    )


def test_a_row_keeps_its_size_when_an_equal_one_is_left_out(folder, words):
    kept = [_row("a", "What number?", "64.png"), _row("b", "How many?")]
    opened = _open(folder, words, [kept[0], *kept])
    assert [dropped.reason for dropped in opened.report.dropped] == ["duplicate"]
    _assert_own_sizes(opened, words)
    assert opened.digest == _open(folder, words, kept).digest


def test_a_row_keeps_its_size_behind_longer_ones_that_are_left_out(folder, words):
    kept = [_row("a", "What number?", "128.png"), _row("b", "How many?", "64.png")]
    longer = _row("b", "very " * 200 + "long", "128.png")
    opened = _open(folder, words, [longer, *kept, longer])
    assert [dropped.reason for dropped in opened.report.dropped] == ["overlong"] * 2
    _assert_own_sizes(opened, words)
    first = _open(folder, words, [longer, *kept], max_rows=1)
    assert (len(first.rows), first.sizes) == (1, opened.sizes[:1])
    assert first.digest == _open(folder, words, kept[:1]).digest != opened.digest


def test_rows_that_are_left_out_are_counted_and_listed(folder, words, tmp_path, capsys):
    rows = [_row("a", "Q?"), _row("b", "very " * 200), _row("c", "")]
    opened = _open(folder, words, rows, workdir=tmp_path)
    assert len(opened.rows) == 1
    told = capsys.readouterr().err
    assert told.endswith("1 of 3 rows; left out: empty_prompt 1, overlong 1\n")
    listed = [json.loads(line) for line in (tmp_path / "dropped_prompts.jsonl").open()]
    assert [(row["id"], row["reason"]) for row in listed] == [
        ("b", "overlong"),
        ("c", "empty_prompt"),
    ]
    _open(folder, words, rows)  # no folder: they are told one by one
    assert "left out: rows.jsonl row 3 (id c): empty_prompt" in capsys.readouterr().err


def test_a_row_that_a_stage_refuses_is_a_wrong_row(folder, words, tmp_path, capsys):
    def check(row):
        if row.id == "b":
            raise records.RowError("format", "b is not liked")

    rows = [_row("a", "Q?"), _row("b", "Q?")]
    assert len(_open(folder, words, rows, workdir=tmp_path, check=check).rows) == 1
    with pytest.raises(errors.InputError, match=r"config\.prompts\.max_bad_rows is 0; format 1"):
        _open(folder, words, rows, workdir=tmp_path, check=check, max_bad_rows=0)
    assert "left out: rows.jsonl row 2 (id b): format: b is not liked" in capsys.readouterr().err


def _assert_own_sizes(opened, words):
    expected = [
        encode.measure(row.prompt, row.images, words, add_generation_prompt=True)
        for row in (opened.rows[n] for n in range(len(opened.rows)))
    ]
    assert opened.sizes == expected
    assert len({size.patches for size in expected}) == len(expected) == 2
