"""Warm-up pairs: four segments, or two whole responses."""

import pytest

from prism_jax.data import pairs, records
from tests import data_files

PLACE = records.Place(file="f.jsonl", row=1)
LEGACY = {"prompt": "Q", "teacher_response": "T", "student_response": "S"}


def parse(row):
    return pairs.parse(row, place=PLACE, source="s")


def test_a_row_of_four_segments_has_no_responses():
    row = parse(data_files.pair_row(7, teacher_response="T", student_response="S"))
    assert row.teacher_caption == "<caption>teacher 7</caption>"
    assert row.student_cot == "<think>student</think><answer>7</answer>"
    assert (row.teacher_response, row.student_response) == (None, None)


def test_whole_responses_count_where_both_teacher_segments_are_empty():
    row = parse(LEGACY | {"teacher_caption": "", "teacher_cot": None, "student_cot": "x"})
    assert (row.teacher_response, row.student_response) == ("T", "S")
    assert records.get_segments(row) == {"teacher_response": "T", "student_response": "S"}


@pytest.mark.parametrize(
    ("prompt", "marked"), [("Q", "<image>Q"), ("look: <image> Q", "look: <image> Q")]
)
def test_the_picture_stands_in_front_unless_the_prompt_places_it(prompt, marked):
    assert parse(LEGACY | {"prompt": prompt, "image": "a.png"}).prompt == marked


def test_a_prompt_without_picture_stays_as_it_is():
    row = parse(LEGACY | {"image": ""})
    assert (row.prompt, row.image) == ("Q", None)


@pytest.mark.parametrize("name", ["question", "problem"])
def test_another_column_stands_in_for_an_empty_prompt(name):
    assert parse(LEGACY | {"prompt": " ", name: "Q2"}).prompt == "Q2"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (LEGACY | {"prompt": ""}, "empty_prompt"),
        (LEGACY | {"prompt": 5}, "bad_type"),
        (LEGACY | {"teacher_response": " "}, "missing_segment"),
        (LEGACY | {"student_response": None}, "missing_segment"),
        (LEGACY | {"student_response": ["S"]}, "bad_type"),
        (LEGACY | {"images": ["a.png", "b.png"]}, "placeholders"),
        (LEGACY | {"videos": ["v", "w"]}, "placeholders"),
        *((data_files.pair_row(0, **{name: ""}), "missing_segment") for name in pairs.SEGMENTS),
        (LEGACY | {"teacher_caption": "c"}, "missing_segment"),
    ],
)
def test_a_wrong_row_is_named(row, reason):
    with pytest.raises(records.RowError) as caught:
        parse(row)
    assert caught.value.reason == reason
