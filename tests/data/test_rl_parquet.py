"""RL rows: every way the published columns may be written gives the same typed row."""

import datetime
import decimal

import numpy as np
import pytest

from prism_jax.data import records, rl_parquet
from tests import data_files

PLACE = records.Place(file="f.parquet", row=1)
TURNS = [{"role": "system", "content": "S"}, {"role": "user", "content": "<image>Q"}]


def parse(row):
    return rl_parquet.parse(row, place=PLACE, source="s")


def test_every_column_arrives():
    row = parse(data_files.prompt_row(4))
    assert row == records.PromptRow(
        id="f.parquet:1",
        source="s",
        prompt=(
            records.Message(role="system", content="Answer."),
            records.Message(role="user", content="<image>\nWhat number 4?\n"),
        ),
        images=(records.Image(path=None, data=data_files.png(4)),),
        teacher_response="response 4",
        teacher_caption="caption 4",
        teacher_cot="cot 4",
        data_source="mm_gad",
        ground_truth="4",
        equivalent_answers=("4.0",),
        extra_info={"index": 4, "split": "train"},
    )


@pytest.mark.parametrize(
    "prompt",
    [
        TURNS,
        {"role": ["system", "user"], "content": ["S", "<image>Q"]},
        [TURNS[0], {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}],
    ],
)
def test_turns_may_be_a_list_or_columns(prompt):
    assert parse({"prompt": prompt}).prompt == (
        records.Message(role="system", content="S"),
        records.Message(role="user", content="<image>Q"),
    )


@pytest.mark.parametrize("prompt", ["Q", "<image>Q", {"role": "user", "content": "<image>Q"}])
def test_a_string_or_one_turn_is_one_user_turn(prompt):
    row = parse({"prompt": prompt, "image": "a.png"})
    assert row.prompt == (records.Message(role="user", content="<image>Q"),)


@pytest.mark.parametrize(
    ("image", "path", "data"),
    [
        ({"bytes": b"x", "path": None}, None, b"x"),
        ({"bytes": b"x", "path": "a.png"}, "a.png", b"x"),
        ({"bytes": None, "path": "a.png"}, "a.png", None),
        ({"path": "a.png"}, "a.png", None),
        ({"image": "a.png"}, "a.png", None),
        ({"image": {"bytes": b"x"}}, None, b"x"),
        ({"image": b"x"}, None, b"x"),
        (b"x", None, b"x"),
        ("a.png", "a.png", None),
    ],
)
@pytest.mark.parametrize("is_list", [True, False])
def test_an_image_may_be_bytes_or_a_path_in_any_wrapping(image, path, data, is_list):
    row = parse({"prompt": "Q", "images": [image] if is_list else image})
    assert row.images == (records.Image(path=path, data=data),)


@pytest.mark.parametrize(
    "row",
    [
        {"reward_model": {"ground_truth": "5", "equivalent_answers": ["5.0", ""]}},
        {"reward_model": '{"ground_truth": "5", "equivalent_answers": ["5.0"]}'},
        {"reward_model": {"ground_truth": "5"}, "equivalent_answers": ["5.0"], "answer": "no"},
        {"ground_truth": "5", "equivalent_answers": ["5.0"]},
        {"answer": "5", "equivalent_answers": ["5.0"], "reward_model": None},
    ],
)
def test_the_answer_may_stand_in_the_reward_model_or_in_a_column(row):
    parsed = parse({"prompt": "Q"} | row)
    assert (parsed.ground_truth, parsed.equivalent_answers) == ("5", ("5.0",))


@pytest.mark.parametrize("values", [["__EMPTY__"], ["5.0", "__EMPTY__"], ["__EMPTY__", "5.0"]])
def test_the_marker_anywhere_in_the_equivalent_answers_voids_them_all(values):
    row = {"prompt": "Q", "reward_model": {"ground_truth": "5", "equivalent_answers": values}}
    parsed = parse(row)
    assert (parsed.ground_truth, parsed.equivalent_answers) == ("5", ())


def test_a_row_of_geometry3k_is_read_as_it_is_published():
    row = parse(
        {"problem": "<image>Find x.", "answer": "3", "images": [{"bytes": b"", "path": "a"}]}
    )
    assert ([(turn.role, turn.content) for turn in row.prompt], row.ground_truth) == (
        [("user", "<image>Find x.")],
        "3",
    )


def test_what_is_not_given_is_none():
    row = parse({"question": "Q"})
    assert (row.ground_truth, row.teacher_caption, row.data_source) == (None, None, None)
    assert (row.images, row.equivalent_answers, row.extra_info) == ((), (), {})


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ('{"index": 1, "tools": [null, 2.5]}', {"index": 1, "tools": [None, 2.5]}),
        ("train", {"extra_info": "train"}),
        ([1, 2], {"extra_info": [1, 2]}),
        (float("nan"), {}),
        (
            {"day": datetime.date(2026, 1, 2), "raw": b"x", "price": decimal.Decimal("1.50")},
            {"day": "2026-01-02", "raw": "eA==", "price": "1.5"},
        ),
    ],
)
def test_extra_info_of_any_form_is_stored(given, kept):
    assert parse({"prompt": "Q", "extra_info": given}).extra_info == kept


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (7.0, "7"),
        (7.5, "7.5"),
        (-0.25, "-0.25"),
        (float(np.float32(7.3)), "7.3"),
        (0.1 + 0.2, "0.30000000000000004"),
        (1e-7, "0.0000001"),
        (100, "100"),
        (2**70, str(2**70)),
        (decimal.Decimal("7.50"), "7.5"),
        ("7.0", "7.0"),
    ],
)
def test_a_number_is_an_answer_wherever_an_answer_may_stand(value, text):
    for row in (
        {"answer": value},
        {"ground_truth": value},
        {"reward_model": {"ground_truth": value}},
        {"reward_model": {"ground_truth": "x", "equivalent_answers": [value]}},
        {"answer": "x", "equivalent_answers": [value]},
    ):
        parsed = parse({"prompt": "Q"} | row)
        assert text in (parsed.ground_truth, *parsed.equivalent_answers)
    assert parse({"prompt": "Q", "answer": float("nan")}).ground_truth is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "empty_prompt"),
        ({"prompt": []}, "empty_prompt"),
        ({"prompt": "  "}, "empty_prompt"),
        ({"prompt": 5}, "bad_type"),
        ({"prompt": {"role": [], "content": []}}, "missing_field"),
        ({"prompt": {"role": ["user"], "content": []}}, "bad_type"),
        ({"prompt": {"text": "Q"}}, "missing_field"),
        ({"prompt": [{"role": "human", "content": "Q"}]}, "bad_role"),
        ({"audios": [{"audio": "v.mp3"}]}, "unsupported"),
        ({"teacher_cot": None}, "missing_segment"),
        ({"teacher_caption": ""}, "missing_segment"),
        ({"teacher_caption": 5}, "bad_type"),
        ({"reward_model": {"ground_truth": ""}}, "empty_answer"),
        ({"reward_model": {"ground_truth": True}}, "bad_type"),
        ({"reward_model": {"ground_truth": float("inf")}}, "bad_type"),
        ({"reward_model": {"ground_truth": '{"target": "7"}'}}, "bad_answer"),
        ({"reward_model": "not json"}, "bad_type"),
        ({"reward_model": "[1]"}, "bad_type"),
        ({"reward_model": {"ground_truth": "5", "equivalent_answers": "5.0"}}, "bad_type"),
        ({"reward_model": {"ground_truth": "5", "equivalent_answers": [None]}}, "bad_type"),
        ({"extra_info": {"x": object()}}, "bad_type"),
        ({"extra_info": '{"x": ' + "[" * 60 + "]" * 60 + "}"}, "bad_type"),
        ({"extra_info": {"x": "\ud800"}}, "not_utf8"),
        ({"data_source": 7}, "bad_type"),
        ({"images": [None]}, "bad_type"),
        ({"images": [{"bytes": None, "path": None}]}, "bad_type"),
    ],
)
def test_a_wrong_row_is_named(change, reason):
    with pytest.raises(records.RowError) as caught:
        parse(data_files.prompt_row(0, **change))
    assert caught.value.reason == reason
