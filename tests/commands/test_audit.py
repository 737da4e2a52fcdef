"""`audit` on a data set with one row of each problem: it names that row and no other."""

import hashlib
import json

import pytest

from prism_jax import main
from prism_jax.commands.audit import pictures, texts
from prism_jax.data import images, records
from prism_jax.data.numerals import corpus as numerals_corpus
from prism_jax.data.numerals import pictures as numerals_pictures
from tests import data_files, html_page
from tests.commands import audited


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    """Return the page and the numbers of the data set."""
    folder = tmp_path_factory.mktemp("audit")
    audited.write(folder)
    assert audited.run(folder, "--model=launch/demo_base") == 0
    text = (folder / "audit.html").read_text(encoding="utf-8")
    return text, json.loads((folder / "audit.json").read_text()), str(folder / "test.parquet")


def test_each_problem_is_found_in_its_row_alone(audit):
    _, numbers, test = audit
    found = {
        name: dict(zip(one["ids"], one["details"], strict=True))
        for name, one in numbers["findings"].items()
    }
    assert found == {
        "cut response": {
            "open": "teacher_cot: <think> is not closed",
            "middle": "teacher_cot: it ends in the middle of a sentence",
        },
        "response at a limit": {},
        "repeated prompt": {"repeat": "as clean"},
        "two truths": {"repeat": "6 here, 5 in clean"},
        "answer that cannot be earned": {
            "unearned": "ground truth is JSON or a list of texts, not one answer",
            "tag": "ground truth contains a tag of the response format",
        },
        f"test row in {test}": {
            "leak": f"row t21 of {test}",
            "encoded": f"row t20 of {test}",
        },
        f"test picture in {test}": {"picture": f"row t22 of {test}"},
        f"look-alike in {test}": {},
        f"test question in {test}": {"text": f"row t23 of {test}"},
    }


def test_the_numbers_say_what_the_rows_hold(audit):
    _, numbers, _ = audit
    (data,) = numbers["data"]
    assert (data["rows_read"], data["rows_kept"]) == (13, 12)
    assert data["dropped_by_reason"] == {"bad_image": 1}
    assert numbers["pictures"]["by_format"] == {"PNG": 10, "JPEG": 1}
    assert numbers["pictures"]["distinct"] == 11  # one is shown twice
    assert numbers["pictures"]["longer_side_pixels"]["greatest"] == 96
    # 96 x 64 pixels are 6 tokens.
    assert 6 < numbers["lengths"]["prompt_tokens"]["least"] < 80
    prompts = numbers["lengths"]["prompt_tokens"]
    assert 12 * prompts["least"] <= prompts["sum"] <= 12 * prompts["greatest"]
    assert numbers["lengths"]["response_tokens"]["least"] == 3  # `<think>It is`
    # "wrong" has no format, and "tag" a tag in its answer, which is therefore empty.
    assert numbers["responses"]["strict_format"]["mean"] == pytest.approx(10 / 12)
    assert numbers["responses"]["right"]["mean"] == pytest.approx(10 / 11)


def test_the_page_shows_all_of_it_in_one_file_and_executes_nothing(audit):
    text, numbers, _ = audit
    page = html_page.Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "form"}
    links = [a for _, attrs in page.tags for n, a in attrs.items() if n in ("src", "href")]
    assert links
    assert all(link.startswith("data:") for link in links)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; \ufffd what?" in text
    assert "<title>Blots &amp; more</title>" in text
    for name, found in numbers["findings"].items():
        assert f'<span class="name">{name}</span><b>{found["rows"]:,}</b>' in text
    # Length of prompts, of responses, sizes of pictures, formats.
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert "mine.parquet row 9" in text


def test_responses_that_stop_at_the_same_length_are_at_a_limit(tmp_path, capsys):
    rows = [data_files.sft_row(i) for i in range(8)]
    for number in (2, 4, 6):
        rows[number]["messages"][1]["content"] = "one two three " * 9 + str(number)
    data_files.write_images(tmp_path, 8)
    path = data_files.write_lines(tmp_path / "rows.jsonl", rows)
    arguments = [f"--data={path}", "--kind=sft", f"--out={tmp_path / 'a.html'}"]
    assert main.main(["audit", *arguments, "--model=launch/demo_base"]) == 0
    assert "response at a limit: 3\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["findings"]["response at a limit"][
        "ids"
    ] == ["row-2", "row-4", "row-6"]


def test_a_data_set_without_a_right_row_has_a_page_too_and_pairs_are_read(tmp_path):
    path = data_files.write_lines(tmp_path / "rows.jsonl", [data_files.pair_row(0)])
    arguments = ["audit", f"--data={path}", "--kind=pairs", f"--out={tmp_path / 'a.html'}"]
    assert main.main(arguments) == 0
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert (numbers["rows"], numbers["data"][0]["rows_read"]) == (0, 1)
    html_page.Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    data_files.write_images(tmp_path, 1)
    rows = [data_files.pair_row(0, prompt="<image>What?", student_cot="It is the")]
    data_files.write_lines(path, rows)
    assert main.main(arguments) == 0
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert numbers["findings"]["cut response"]["details"] == [
        "student_cot: it ends in the middle of a sentence"
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think>a</think><answer>5", "<answer> is not closed"),
        ("So \\boxed{\\frac{1}{2}", "\\boxed{ is not closed"),
        ("```python\nprint(1)", "a block of code is not closed"),
        ("It is larger than the", "it ends in the middle of a sentence"),
        ("So it is 3,", "it ends in the middle of a sentence"),
        ("So \\boxed{\\frac{1}{2}}", None),
        ("The answer is a", None),
        ("It is 42", None),
        ("<caption>a</caption><think>b</think><answer>5</answer>\n", None),
    ],
)
def test_a_text_is_cut_where_something_is_open(text, reason):
    assert texts.cut_reason(text) == reason


def test_scaled_and_encoded_copies_look_alike_and_pictures_of_a_corpus_do_not():
    def seen(picture, kind="PNG", **options):
        data = data_files.encoded(picture, kind, **options)
        return pictures.look_at(_validated(data))

    stream = numerals_corpus.stream(level="small", seed=0, name="align", rows=24)
    drawn = [example.picture() for example in stream]
    drawn += [audited.picture(seed) for seed in range(8)]
    originals = [seen(one) for one in drawn]
    same = [(i, i) for i in range(len(drawn))]
    assert list(pictures.alike(originals, originals)) == same
    encoded = [seen(one, "JPEG", quality=75) for one in drawn]
    assert list(pictures.alike(originals, encoded)) == same
    half = [seen(one.resize((one.width // 2, one.height // 2))) for one in drawn]
    assert set(pictures.alike(originals, half)) >= set(same[24:])
    flat = [seen(numerals_pictures.Image.new("RGB", (64, 64), shade)) for shade in ("red", "blue")]
    assert not list(pictures.alike(flat, flat))


def _validated(data: bytes) -> records.Image:
    width, height = images.open_image(data, name="x", limit_pixels=10**6).size
    return records.Image(
        path=None,
        data=data,
        sha256=hashlib.sha256(data).hexdigest(),
        width_pixels=width,
        height_pixels=height,
    )


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--num_examples=-1", "--num_examples must be >= 0, got -1"),
        ("--out=a.json", "--out=a.json: must be the HTML file"),
        ("--data=nowhere.parquet", "nowhere.parquet: no such file or folder"),
        ("--model=nowhere", "nowhere: no such folder"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, argument, told):
    path = data_files.write_lines(tmp_path / "rows.jsonl", [data_files.sft_row(0)])
    given = [f"--data={path}", "--kind=sft", f"--out={tmp_path / 'a.html'}", argument]
    assert main.main(["audit", *given]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
