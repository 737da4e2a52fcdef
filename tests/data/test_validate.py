"""Every wrong way a row can be is named, counted, listed, and never lost silently."""

import json
import os

import pytest
from PIL import Image

from prism_jax import errors
from prism_jax.data import paths, records, sources, validate
from tests import data_files

USER = {"role": "user", "content": "<image>Q"}
ASSISTANT = {"role": "assistant", "content": "A"}


def source_of(tmp_path, rows, kind="sft") -> sources.Source:
    data_files.write_images(tmp_path, 4)
    path = data_files.write_lines(tmp_path / "rows.jsonl", rows)
    return sources.Source(kind=kind, path=str(path))


def reasons(tmp_path, rows, kind="sft", **rules) -> list[tuple[int, str]]:
    """Return (line, reason) of the dropped rows; two right rows are added at the end."""
    make = {"sft": data_files.sft_row, "pairs": data_files.pair_row}.get(kind)
    right = [make(i) for i in (0, 1)] if make else [{"prompt": f"Q{i}"} for i in (0, 1)]
    kept, report = data_files.read_all(
        source_of(tmp_path, rows + right, kind), max_bad_rows=100, **rules
    )
    assert report.num_kept == len(kept) == len(rows) + 2 - len(report.dropped)
    assert report.num_read == len(rows) + 2
    assert all(row.file == "rows.jsonl" and row.is_wrong for row in report.dropped)
    return [(row.row, row.reason) for row in report.dropped]


def turns(*roles: str) -> list[dict]:
    named = {
        "u": USER,
        "v": {"role": "user", "content": "more"},
        "a": ASSISTANT,
        "s": {"role": "system", "content": "S"},
    }
    return [named[role] for role in roles]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": []}, "placeholders"),
        ({"images": ["0.png", "1.png"]}, "placeholders"),
        ({"images": None}, "placeholders"),
        ({"messages": [{"role": "user", "content": "Q"}, ASSISTANT]}, "placeholders"),
        ({"messages": [USER, {"role": "assistant", "content": "<image>"}]}, "placeholders"),
        (
            {"messages": [{"role": "user", "content": "<image><|image_pad|>Q"}, ASSISTANT]},
            "special_token",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "A<|im_end|>"}]}, "special_token"),
        (
            {"messages": [{"role": "user", "content": "<image><|vision_start|>Q"}, ASSISTANT]},
            "special_token",
        ),
        ({"system": "<|im_start|>system"}, "special_token"),
        ({"messages": turns("u")}, "no_response"),
        ({"messages": turns("s", "u")}, "no_response"),
        ({"messages": turns("s")}, "no_response"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "empty_answer"),
        ({"messages": [{"role": "user", "content": " "}, ASSISTANT]}, "empty_prompt"),
        ({"messages": [{"role": "user", "content": "<image><video>Q"}, ASSISTANT]}, "placeholders"),
        ({"messages": [{"role": "user", "content": "<image><audio>"}, ASSISTANT]}, "unsupported"),
        ({"system": "Look at the <video> first."}, "placeholders"),
        ({"messages": turns("a", "u")}, "role_order"),
        ({"messages": turns("u", "v", "a")}, "role_order"),
        ({"messages": turns("u", "a", "a")}, "role_order"),
        ({"messages": turns("u", "s", "a")}, "role_order"),
        ({"messages": turns("u", "a", "v")}, "role_order"),
        ({"messages": turns("s", "s", "u", "a")}, "role_order"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "bad_role"),
        ({"messages": {"role": "user"}}, "bad_type"),
        ({"images": 7}, "bad_type"),
    ],
)
def test_a_wrong_demonstration_is_named_with_its_line(tmp_path, change, reason):
    row = data_files.sft_row(2, **change)
    assert reasons(tmp_path, [row]) == [(1, reason)]


@pytest.mark.parametrize(
    "messages",
    [
        turns("u", "a"),
        turns("s", "u", "a"),
        turns("u", "a", "v", "a"),
        [{"role": "user", "content": "a <|x|> b<image>"}, ASSISTANT],
        [{"role": "user", "content": "compare"}, ASSISTANT, USER, ASSISTANT],
        [{"role": "user", "content": "<image>\n"}, ASSISTANT],
    ],
)
def test_a_valid_conversation_is_accepted(tmp_path, messages):
    assert reasons(tmp_path, [data_files.sft_row(2, messages=messages)]) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"student_cot": ""}, "missing_segment"),
        ({"prompt": "  "}, "empty_prompt"),
        ({"prompt": "<video>Q"}, "placeholders"),
        ({"prompt": "<image><image>Q"}, "placeholders"),
        ({"prompt": "<image>Q", "image": None}, "placeholders"),
        ({"teacher_cot": "<image>"}, "placeholders"),
        ({"student_caption": "<|endoftext|>"}, "special_token"),
        ({"image": "none.png"}, "image_missing"),
    ],
)
def test_a_wrong_pair_is_named(tmp_path, change, reason):
    assert reasons(tmp_path, [data_files.pair_row(2, **change)], "pairs") == [(1, reason)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [{"role": "user", "content": "Q"}], "image": "0.png"}, "placeholders"),
        ({"prompt": [ASSISTANT]}, "role_order"),
        ({"prompt": turns("v", "a")}, "role_order"),
        ({"prompt": turns("s")}, "role_order"),
        ({"prompt": "Q<|im_start|>"}, "special_token"),
        ({"prompt": "Q", "teacher_response": "<|im_end|>"}, "special_token"),
        ({"prompt": "Q", "answer": "\n"}, "empty_answer"),
    ],
)
def test_a_wrong_prompt_is_named(tmp_path, row, reason):
    assert reasons(tmp_path, [row], "prompts") == [(1, reason)]


def test_a_stage_may_need_teacher_texts_and_answers(tmp_path):
    full = {"prompt": "Q", "teacher_caption": "c", "teacher_cot": "t", "answer": "5"}
    rows = [full, full | {"answer": None}, {"prompt": "Q", "answer": "5"}]
    source = source_of(tmp_path, rows, "prompts")
    rules = {"max_bad_rows": 2, "need_teacher": True, "need_answer": True}
    kept, report = data_files.read_all(source, **rules)
    assert len(kept) == 1
    assert [(r.row, r.reason) for r in report.dropped] == [
        (2, "empty_answer"),
        (3, "missing_segment"),
    ]


def jpeg() -> bytes:
    noise = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    return data_files.encoded(noise, "JPEG")


def bomb(side: int) -> bytes:
    return data_files.encoded(Image.new("1", (side, side)), "PNG")


BAD_IMAGES = {
    "empty": b"",
    "html": b"<html><body>404 Not Found</body></html>",
    "cut jpeg": jpeg()[:600],
    "cut png": data_files.png(size=(200, 200))[:-30],
    "damaged png": data_files.png().replace(b"IDAT", b"IDAX"),
    "text": b"not an image",
    "bomb": bomb(8000),  # 64 megapixels in 8 KB
    "bigger bomb": bomb(20_000),
    "thin": data_files.png(size=(201 * 2, 2)),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_file_is_named_with_row_and_path(tmp_path, name):
    tmp_path.joinpath("bad.png").write_bytes(BAD_IMAGES[name])
    row = data_files.sft_row(2, images=["bad.png"])
    assert reasons(tmp_path, [row]) == [(1, "bad_image")]
    with pytest.raises(
        errors.InputError, match=r"rows\.jsonl row 1 .id row-2.: bad_image.*bad\.png"
    ):
        data_files.read_all(source_of(tmp_path, [row]))


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_bytes_in_a_parquet_are_named(tmp_path, name):
    images = [{"bytes": BAD_IMAGES[name], "path": None}]
    rows = [data_files.prompt_row(0), data_files.prompt_row(1, images=images)]
    path = data_files.write_parquet(tmp_path / "rows.parquet", rows, group_rows=10)
    source = sources.Source(kind="prompts", path=str(path))
    kept, report = data_files.read_all(source, max_bad_rows=1)
    assert len(kept) == 1
    assert [(r.row, r.reason) for r in report.dropped] == [(2, "bad_image")]


GREY = Image.new("L", (30, 20), 99)
ODD_IMAGES = {
    "palette": data_files.encoded(GREY.convert("P"), "PNG"),
    "grey and alpha": data_files.encoded(GREY.convert("LA"), "PNG"),
    "16 bits": data_files.encoded(Image.new("I;16", (30, 20), 999), "PNG"),
    "cmyk": data_files.encoded(GREY.convert("CMYK"), "JPEG"),
    "bits": data_files.encoded(GREY.convert("1"), "PNG"),
    "rgba": data_files.encoded(GREY.convert("RGBA"), "PNG"),
    "animated": data_files.encoded(
        GREY, "GIF", save_all=True, append_images=[Image.new("L", (30, 20), 3)]
    ),
    "webp": data_files.encoded(GREY, "WEBP"),
}


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_the_bytes_of_an_unusual_image_are_unchanged(tmp_path, name):
    tmp_path.joinpath("odd").write_bytes(ODD_IMAGES[name])
    source = source_of(tmp_path, [data_files.sft_row(2, images=["odd"])])
    (row,), _ = data_files.read_all(source)
    (image,) = row.images
    assert image.data == ODD_IMAGES[name]
    assert (image.width_pixels, image.height_pixels) == (30, 20)


def test_a_rotated_photo_has_the_size_it_is_seen_with(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    tmp_path.joinpath("odd").write_bytes(data_files.encoded(GREY, "JPEG", exif=exif))
    (row,), _ = data_files.read_all(source_of(tmp_path, [data_files.sft_row(2, images=["odd"])]))
    assert (row.images[0].width_pixels, row.images[0].height_pixels) == (20, 30)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("none.png", "image_missing"),
        ("folder", "image_missing"),
        ("pipe", "image_missing"),
        ("loop.png", "image_missing"),
        ("x" * 500_000, "image_missing"),
        ("../secret.png", "unsafe_path"),
        ("folder/../../secret.png", "unsafe_path"),
        ("link.png", "unsafe_path"),
        ("linked/secret.png", "unsafe_path"),
        ("/etc/hostname", "unsafe_path"),
        ("/dev/zero", "unsafe_path"),
        ("{sibling}", "unsafe_path"),
        ("0.png\0.jpg", "unsafe_path"),
        ("http://host/0.png", "unsafe_path"),
        ("file:///etc/hostname", "unsafe_path"),
        ("FILE:/etc/hostname", "unsafe_path"),
        ("gs://bucket/0.png", "unsafe_path"),
        ("data:image/png;base64,AAAA", "unsafe_path"),
        ("big.png", "image_too_big"),
    ],
)
def test_an_image_path_that_is_missing_or_leads_out_is_named(tmp_path, path, reason):
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    tmp_path.joinpath("secret.png").write_bytes(data_files.png())
    tmp_path.joinpath("root2").mkdir()
    tmp_path.joinpath("root2", "0.png").write_bytes(data_files.png())
    root.joinpath("link.png").symlink_to(tmp_path / "secret.png")
    root.joinpath("linked").symlink_to(tmp_path)
    root.joinpath("loop.png").symlink_to("loop.png")
    root.joinpath("big.png").write_bytes(data_files.png() + bytes(5000))
    os.mkfifo(root / "pipe")
    path = path.format(sibling=tmp_path / "root2" / "0.png")
    row = data_files.sft_row(2, images=[path])
    assert reasons(root, [row], limit_image_bytes=4000) == [(1, reason)]
    with pytest.raises(validate.WrongRows) as caught:
        data_files.read_all(source_of(root, [row]), limit_image_bytes=4000)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "path", ["0.png", "./0.png", "folder/../0.png", "inner.png", "{root}/0.png"]
)
def test_an_image_path_inside_the_root_is_read(tmp_path, path):
    (tmp_path / "folder").mkdir()
    tmp_path.joinpath("inner.png").symlink_to("0.png")
    row = data_files.sft_row(2, images=[path.format(root=tmp_path)])
    assert reasons(tmp_path, [row]) == []


def test_a_link_between_folders_inside_the_root_is_followed_and_the_root_may_be_relative(
    tmp_path, monkeypatch
):
    data_files.write_images(tmp_path / "real" / "folder", 1)
    tmp_path.joinpath("root").symlink_to("real")
    tmp_path.joinpath("real", "linked").symlink_to("folder")
    monkeypatch.chdir(tmp_path)
    for root in ("root", str(tmp_path / "root")):
        assert paths.read_image(root, "linked/0.png", limit_bytes=4000) == data_files.png(0)
        # Links are resolved before what stands behind them.
        path = paths.inside(root, "linked/../folder/0.png")
        assert path == str(tmp_path.resolve() / "real" / "folder" / "0.png")


def test_the_image_root_may_be_another_folder_than_the_files(tmp_path):
    data_files.write_images(tmp_path / "pictures", 1)
    path = data_files.write_lines(tmp_path / "texts" / "rows.jsonl", [data_files.sft_row(0)])
    source = sources.Source(kind="sft", path=str(path), image_root=str(tmp_path / "pictures"))
    (row,), _ = data_files.read_all(source)
    assert row.images[0].data == data_files.png(0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [', "malformed"),
        (b"\xff\xfe{}", "not_utf8"),
        (b"[]", "bad_type"),
        (b'"text"', "bad_type"),
        (b"{}", "missing_field"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, reason):
    assert reasons(tmp_path, [line]) == [(1, reason)]


def test_rows_with_the_same_id_get_unique_ids_and_equal_rows_are_dropped(tmp_path):
    ids = ((0, "a"), (1, 7), (2, "a"), (3, "7"), (0, "a"), (0, "a#2"), (1, "a"))
    rows = [data_files.sft_row(i, id=name) for i, name in ids]
    # The same words about another picture are another row.
    rows.append(rows[0] | {"images": ["3.png"]})
    kept, report = data_files.read_all(source_of(tmp_path, rows))
    names = ["a", "7", "a#2", "7#2", "a#2#2", "a#3", "a#4"]
    assert [row.id for row in kept] == names
    assert [(r.row, r.reason, r.is_wrong) for r in report.dropped] == [(5, "duplicate", False)]
    assert report.dropped[0].message == "the same as row 1 of the data set"
    assert report.summary()["ids_made_unique"] == 5


def test_many_wrong_rows_end_the_reading_before_the_file_does(tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "_MOST_LISTED", 5)
    path = data_files.write_lines(tmp_path / "rows.jsonl", [{}] * 1000)
    with pytest.raises(validate.WrongRows, match="6 of 6 rows are wrong"):
        data_files.read_all(sources.Source(kind="prompts", path=str(path)))


def test_the_digest_of_rows_is_of_texts_pictures_and_order_alone(tmp_path):
    def digest(*rows, folder="first", name="rows.jsonl"):
        data_files.write_images(tmp_path / folder, 4)
        path = data_files.write_lines(tmp_path / folder / name, list(rows))
        source = sources.Source(kind="sft", path=str(path))
        opened = sources.open_source(source, validate.Rules(), cache_dir=None)
        return bytes(opened.report.digests)

    first, second = data_files.sft_row(0), data_files.sft_row(1)
    base = digest(first, second)
    assert base == digest(first | {"id": "x"}, second, folder="second", name="other.jsonl")
    sized = [{"path": "1.png", "max_pixels": 5000}]
    shown = [second["messages"][0], second["messages"][1] | {"weight": 1}]
    assert base == digest(first, second | {"messages": shown})
    others = (
        (second, first),
        (first, second, data_files.sft_row(2)),
        (first, second | {"images": ["2.png"]}),
        (first, second | {"images": sized}),
        (first, second | {"system": "S"}),
    )
    assert len({base, *(digest(*rows) for rows in others)}) == len(others) + 1


def test_more_wrong_rows_than_allowed_are_counted_and_the_error_holds_every_one(tmp_path):
    missing = [data_files.sft_row(0, id=f"m{i}", images=["none.png"]) for i in range(11)]
    silent = [data_files.sft_row(0, id="s", messages=turns("u"))]
    source = source_of(tmp_path, [data_files.sft_row(1), *missing, *silent])
    with pytest.raises(validate.WrongRows) as caught:
        data_files.read_all(source, max_bad_rows=11, option="config.data.max_bad_rows")
    assert str(caught.value) == (
        "rows: 12 of 13 rows are wrong, config.data.max_bad_rows is 11; "
        "image_missing 11, no_response 1; "
        "first rows.jsonl row 2 (id m0): image_missing: no file at 'none.png' "
        f"below {tmp_path}"
    )
    assert [row.row for row in caught.value.report.dropped] == list(range(2, 14))
    kept, report = data_files.read_all(source, max_bad_rows=12)
    assert len(kept) == 1
    assert report.summary() == {
        "name": "rows",
        "rows_read": 13,
        "rows_kept": 1,
        "rows_dropped": 12,
        "ids_made_unique": 0,
        "dropped_by_reason": {"image_missing": 11, "no_response": 1},
    }
    listed = [json.loads(line) for line in report.lines().splitlines()]
    assert [row["row"] for row in listed] == list(range(2, 14))


def words(row: records.Row) -> int:
    return sum(len(text.split()) for text in records.get_texts(row))


LENGTHS = {"count_tokens": words, "max_tokens": 4}


@pytest.mark.parametrize("overlong", ["error", "filter"])
def test_an_overlong_row_is_wrong_or_filtered_and_always_reported(tmp_path, overlong):
    rows = [{"prompt": "one two three four"}, {"prompt": "one two three four five"}]
    source = source_of(tmp_path, rows, "prompts")
    if overlong == "error":
        with pytest.raises(errors.InputError, match="overlong: 5 tokens, the limit is 4"):
            data_files.read_all(source, overlong="error", **LENGTHS)
        return
    kept, report = data_files.read_all(source, overlong="filter", **LENGTHS)
    assert len(kept) == 1
    assert report.counts() == {"overlong": 1}
    assert not report.dropped[0].is_wrong


@pytest.mark.parametrize("num_threads", [1, 4])
def test_the_report_has_the_counts_of_accepted_rows(tmp_path, num_threads):
    rows = [{"prompt": text} for text in ("a b", "1 2 3 4 5", "a", "")]
    rows += [{"id": "x", "prompt": "a b c"}, {"id": "x", "prompt": "a b c"}]

    def count(row):
        return words(row), 7

    kept, report = data_files.read_all(
        source_of(tmp_path, rows, "prompts"),
        count_tokens=count,
        max_tokens=4,
        overlong="filter",
        max_bad_rows=2,
        num_threads=num_threads,
    )
    assert report.counts() == {"duplicate": 1, "empty_prompt": 1, "overlong": 1}
    assert report.counted == [(2, 7), (1, 7), (3, 7)]
    assert [words(row) for row in kept] == [2, 1, 3]


def test_a_row_that_the_counter_refuses_is_named(tmp_path):
    def refuse(row):
        raise errors.InputError("too many patches")

    with pytest.raises(errors.InputError, match="unprocessable: too many patches"):
        data_files.read_all(
            source_of(tmp_path, [{"prompt": "Q"}], "prompts"), count_tokens=refuse, max_tokens=1
        )


@pytest.mark.parametrize("rows", [[], [b"   "]])
@pytest.mark.parametrize("kind", records.KINDS)
def test_a_data_set_without_rows_is_refused(tmp_path, rows, kind):
    with pytest.raises(errors.InputError, match="rows: no rows: 0 read, 0 dropped"):
        data_files.read_all(source_of(tmp_path, rows, kind))


def test_a_data_set_with_nothing_left_is_refused_even_when_bad_rows_are_allowed(tmp_path):
    with pytest.raises(errors.InputError, match="no rows: 1 read, 1 dropped; missing_field 1"):
        data_files.read_all(source_of(tmp_path, [{}]), max_bad_rows=5)


@pytest.mark.parametrize("rules", [{"max_bad_rows": -1}, {"overlong": "truncate"}])
def test_wrong_rules_are_refused(rules):
    with pytest.raises(errors.InputError, match=next(iter(rules))):
        validate.Rules(**rules)
