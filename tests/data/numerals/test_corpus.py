"""The corpus as files: formats, disjoint splits, same bytes from the same seed."""

import dataclasses
import hashlib
import io
import json

import pytest
from PIL import Image
from pyarrow import parquet

from prism_jax import errors
from prism_jax.data import prompts
from prism_jax.data.numerals import corpus as numerals_corpus
from prism_jax.data.numerals import demonstrations as numerals_demonstrations
from prism_jax.data.numerals import pictures as numerals_pictures

_FEW = {"base": 4, "public": 8, "teacher": 5, "align": 6, "rl_train": 7, "rl_test": 4}


def _write(out, *, level="tiny", seed=3, num_processes=1, **overrides):
    return numerals_corpus.write(
        out,
        level=level,
        seed=seed,
        rows=numerals_corpus.rows_of(level, _FEW | overrides),
        slips=numerals_corpus.slips_of(level, {}),
        num_processes=num_processes,
    )


def _all_bytes(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numerals") / "corpus"
    _write(folder)
    return folder


@pytest.mark.parametrize("level", ["tiny", "small"])
def test_same_arguments_give_the_same_bytes_and_another_seed_others(tmp_path, level):
    few = {"public": 4, "align": 4}
    _write(tmp_path / "a", level=level, **few)
    _write(tmp_path / "b", level=level, **few)
    _write(tmp_path / "c", level=level, seed=4, **few)
    first, again, other = (_all_bytes(tmp_path / name) for name in "abc")
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[path] != other[path] for path in first if path.endswith(".png"))


def test_more_rows_begin_with_the_fewer_ones(tmp_path, corpus):
    _write(tmp_path / "more", public=12)
    few = json.loads((corpus / "sft/public.json").read_text())
    more = json.loads((tmp_path / "more/sft/public.json").read_text())
    assert len(few) == 8
    assert more[:8] == few
    picture = "sft/images/public/000007.png"
    assert (corpus / picture).read_bytes() == (tmp_path / "more" / picture).read_bytes()


def test_public_demonstrations_are_sharegpt_messages_with_a_picture_each(corpus):
    rows = json.loads((corpus / "sft/public.json").read_text())
    for row in rows:
        assert set(row) == {"messages", "images"}
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == prompts.SYSTEM_PROMPT
        assert row["messages"][1]["content"].count("<image>") == len(row["images"]) == 1
        with Image.open(corpus / "sft" / row["images"][0]) as picture:
            assert picture.width % 32 == picture.height % 32 == 0


def test_teacher_demonstrations_are_sharegpt_conversations_with_a_system_column(corpus):
    rows = json.loads((corpus / "sft/teacher.json").read_text())
    assert len(rows) == 5
    for row in rows:
        assert set(row) == {"conversations", "images", "system"}
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"]
        assert row["conversations"][0]["value"].startswith("<image>\n")
        assert (corpus / "sft" / row["images"][0]).exists()


def test_base_demonstrations_have_no_tags_and_of_four_two_are_detailed_two_have_a_system_prompt(
    corpus,
):
    rows = json.loads((corpus / "sft/base.json").read_text())
    responses = [row["conversations"][1]["value"] for row in rows]
    assert not any("<" in response for response in responses)
    assert ["Style: " in response for response in responses] == [False, True, False, True]
    assert [row["system"] for row in rows] == ["", "", prompts.SYSTEM_PROMPT, prompts.SYSTEM_PROMPT]


def test_two_processes_write_the_bytes_that_one_writes(tmp_path):
    rows = {"base": 1001, "public": 199, "teacher": 0, "align": 501, "rl_train": 300, "rl_test": 1}
    _write(tmp_path / "one", **rows)
    _write(tmp_path / "two", num_processes=2, **rows)
    assert _all_bytes(tmp_path / "one") == _all_bytes(tmp_path / "two")


def test_dataset_info_names_every_file_and_its_columns(corpus):
    info = json.loads((corpus / "sft/dataset_info.json").read_text())
    assert set(info) == {"numerals_base", "numerals_public", "numerals_teacher"}
    for entry in info.values():
        assert entry["formatting"] == "sharegpt"
        row = json.loads((corpus / "sft" / entry["file_name"]).read_text())[0]
        assert set(row) == set(entry["columns"].values())


@pytest.mark.parametrize(
    ("path", "count", "split"),
    [
        ("rl/train.parquet", 7, "train"),
        ("rl/test.parquet", 4, "test"),
        ("align/train.parquet", 6, "train"),
    ],
)
def test_parquet_rows_hold_the_published_columns(corpus, path, count, split):
    rows = parquet.read_table(corpus / path).to_pylist()
    assert len(rows) == count
    for index, row in enumerate(rows):
        assert set(row) == {
            "data_source", "prompt", "images", "ability", "reward_model", "extra_info",
            "teacher_response", "teacher_caption", "teacher_cot",
        }  # fmt: skip
        question = row["extra_info"]["question"]
        assert row["prompt"] == [
            {"role": "system", "content": prompts.SYSTEM_PROMPT},
            {"role": "user", "content": f"<image>\n{question}\n"},
        ]
        assert row["extra_info"]["index"] == index
        assert row["extra_info"]["split"] == split
        truth = row["reward_model"]["ground_truth"]
        assert row["extra_info"]["answer"] == truth
        assert row["reward_model"]["style"] == "rule"
        assert f"<answer>\n{truth}\n</answer>" in row["teacher_cot"]
        assert row["teacher_caption"] + row["teacher_cot"] == row["teacher_response"]
        assert row["teacher_caption"].endswith("</caption>")
        with Image.open(io.BytesIO(row["images"][0]["bytes"])) as picture:
            assert picture.format == "PNG"


def test_a_choice_accepts_the_letter_the_option_and_its_text(tmp_path):
    _write(tmp_path / "corpus", level="small", align=60)
    rows = parquet.read_table(tmp_path / "corpus/align/train.parquet").to_pylist()
    choices = [row for row in rows if row["extra_info"]["question_type"].endswith("_choice")]
    assert choices
    for row in choices:
        letter = row["reward_model"]["ground_truth"]
        line, text = row["reward_model"]["equivalent_answers"]
        assert line == f"{letter}. {text}"
        assert line in row["extra_info"]["question"].split("\n")
    for row in rows:
        if row not in choices:
            assert row["reward_model"]["equivalent_answers"] == ["__EMPTY__"]


def test_train_and_test_share_neither_handwriting_nor_pictures(corpus):
    train, test = (numerals_pictures.handwriting(is_test=is_test) for is_test in (False, True))
    pixels = [
        {sample.tobytes() for samples in split.values() for sample in samples}
        for split in (train, test)
    ]
    assert not pixels[0] & pixels[1]
    counts = [sum(map(len, split.values())) for split in (train, test)]
    assert sum(counts) == 1797
    assert all(len(samples) >= 20 for samples in test.values())
    shown = [
        {
            hashlib.sha256(row["images"][0]["bytes"]).digest()
            for path in paths
            for row in parquet.read_table(corpus / path).to_pylist()
        }
        for paths in (["rl/train.parquet", "align/train.parquet"], ["rl/test.parquet"])
    ]
    assert len(shown[0]) == 13
    assert not shown[0] & shown[1]


def test_the_manifest_records_arguments_slips_and_checksums(corpus):
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert manifest["seed"] == 3
    assert manifest["level"] == "tiny"
    assert manifest["rows"] == _FEW
    assert manifest["slips"] == {"perception": 0.05, "arithmetic": 0.05, "habit": 0.65}
    assert manifest["parts"]["teacher"]["rows_with_wrong_answer"] == 0
    for path, checksum in manifest["files"].items():
        assert hashlib.sha256((corpus / path).read_bytes()).hexdigest() == checksum
    assert len(manifest["files"]) == 7


def test_a_finished_corpus_is_left_as_it_is_and_another_refused(tmp_path):
    manifest = _write(tmp_path / "corpus", public=2)
    before = (tmp_path / "corpus/sft/public.json").stat().st_mtime_ns
    assert _write(tmp_path / "corpus", public=2) == manifest
    assert (tmp_path / "corpus/sft/public.json").stat().st_mtime_ns == before
    with pytest.raises(errors.InputError, match="seed 3, not 4"):
        _write(tmp_path / "corpus", public=2, seed=4)
    (tmp_path / "corpus/sft/public.json").write_text("[]")
    with pytest.raises(errors.InputError, match="files that differ"):
        _write(tmp_path / "corpus", public=2)


def test_a_damaged_picture_in_a_finished_corpus_is_an_error(tmp_path):
    _write(tmp_path / "corpus")
    (tmp_path / "corpus/sft/images/public/000001.png").write_bytes(b"no picture")
    with pytest.raises(errors.InputError, match="pictures of public"):
        _write(tmp_path / "corpus")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(errors.InputError, match="must be empty"):
        _write(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_run_leaves_nothing_behind_for_the_next(tmp_path, corpus):
    partial = tmp_path / "corpus.partial"
    (partial / "sft").mkdir(parents=True)
    (partial / "sft/public.json").write_text("[")
    _write(tmp_path / "corpus")
    assert not partial.exists()
    assert _all_bytes(tmp_path / "corpus") == _all_bytes(corpus)


def test_a_part_of_no_rows_is_left_out(tmp_path):
    manifest = _write(tmp_path / "corpus", base=0, teacher=0, rl_train=0)
    assert set(manifest["parts"]) == {"public", "align", "rl_test"}
    info = json.loads((tmp_path / "corpus/sft/dataset_info.json").read_text())
    assert set(info) == {"numerals_public"}
    assert not (tmp_path / "corpus/rl/train.parquet").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: numerals_corpus.rows_of("huge", {}), "tiny, small, got 'huge'"),
        (lambda: numerals_corpus.rows_of("tiny", {"publik": 1}), "got 'publik'"),
        (lambda: numerals_corpus.rows_of("tiny", {"public": -1}), "got -1"),
        (lambda: numerals_corpus.slips_of("tiny", {"perception": 1.5}), "got 1.5"),
        (lambda: numerals_corpus.slips_of("tiny", {"spelling": 0.5}), "got 'spelling'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(errors.InputError, match=message):
        call()


def test_overrides_change_only_what_they_name():
    rows = numerals_corpus.rows_of("tiny", {"public": 1})
    assert rows == dataclasses.replace(numerals_corpus.rows_of("tiny", {}), public=1)


@pytest.mark.parametrize("level", ["tiny", "small"])
def test_sample_texts_hold_every_character_and_word_of_the_corpus(level):
    words = set(" ".join(numerals_corpus.sample_texts(level, 0, 4000)).split())
    unseen = set()
    for example in numerals_corpus.stream(level=level, seed=1, name="rl_test", rows=300):
        unseen |= {*example.question.text.split(), *example.teacher.response.split()} - words
    # Numbers are spelt digit by digit by any tokenizer.
    assert not {word for word in unseen if not any(letter.isdigit() for letter in word)}
    assert len(numerals_corpus.sample_texts(level, 0, 10)) == 10


def test_segments_split_after_the_first_closing_caption_tag():
    response = numerals_demonstrations.response_text(caption="- a", think="b", answer="c")
    assert numerals_demonstrations.split_segments(response) == (
        "<caption>\n- a\n</caption>",
        "\n<think>\nb\n</think>\n<answer>\nc\n</answer>",
    )


def test_a_preview_shows_the_given_number_of_pictures():
    sheet = numerals_corpus.preview("tiny", seed=0, name="rl_train", columns=3, rows=2, scale=2)
    assert sheet.width % 3 == sheet.height % 2 == 0
    assert sheet.width // 3 >= 240
