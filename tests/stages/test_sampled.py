"""Prompts are opened: each row has its own size, whatever else the file holds."""

import json

import pytest

from prism_jax.data import encode, processor
from prism_jax.stages import sampled
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


def _open(folder, words, rows, **changes):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = sampled.Prompts(**(_OPTIONS | {"path": str(path)} | changes))
    return sampled.open_prompts(options, words, need_teacher=False, need_answer=True)


def test_a_row_keeps_its_size_when_one_of_the_same_id_is_left_out(folder, words):
    kept = [_row("a", "What number?", "64.png"), _row("b", "How many?")]
    duplicate = _row("a", "What is the number that you see here?", "64.png", "128.png")
    opened = _open(folder, words, [*kept, duplicate])
    assert [dropped.reason for dropped in opened.report.dropped] == ["duplicate_id"]
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


def _assert_own_sizes(opened, words):
    expected = [
        encode.measure(row.prompt, row.images, words, add_generation_prompt=True)
        for row in (opened.rows[n] for n in range(len(opened.rows)))
    ]
    assert opened.sizes == expected
    assert len({size.patches for size in expected}) == len(expected) == 2
