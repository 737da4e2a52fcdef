"""What a turn holds is honoured or refused by name: flags, parts, pictures, reasoning."""

import json
import time

import pytest

from prism_jax.data import fields, pairs, records, rl_parquet, sharegpt
from tests import data_files

PLACE = records.Place(file="f.json", row=1)
USER = {"role": "user", "content": "<image>Q"}
ANSWER = {"role": "assistant", "content": "A"}
NAMED = {"type": "image", "image": "b.png"}
TEXT = {"type": "text", "text": "Q"}


def parse(messages, **row) -> records.SFTRow:
    return sharegpt.parse({"messages": messages} | row, place=PLACE, source="s", columns=None)


def prompt(value, **row) -> records.PromptRow:
    return rl_parquet.parse({"prompt": value} | row, place=PLACE, source="s")


def paths(row) -> list[str | None]:
    return [image.path for image in records.get_images(row)]


def learned(row) -> list[bool]:
    return [turn.is_learned for turn in row.messages if turn.role == "assistant"]


TWO = [USER, ANSWER, {"role": "user", "content": "more"}, ANSWER]


@pytest.mark.parametrize("flag", ["weight", "loss", "trainable", "train", "loss_mask"])
@pytest.mark.parametrize("value", [0, 0.0, False])
def test_a_turn_that_is_not_learned_stays_and_is_marked(flag, value):
    messages = [USER | {flag: value}, ANSWER | {flag: value}, *TWO[2:]]
    assert learned(parse(messages, images=["a.png"])) == [False, True]
    assert learned(parse([USER, ANSWER | {flag: 1}, *TWO[2:]])) == [True, True]


def test_the_column_loss_mask_has_a_flag_for_each_turn():
    assert learned(parse(TWO, loss_mask=[0, 0, 0, 1])) == [False, True]
    assert learned(parse(TWO, loss_mask=[0, True, 0, 1.0], system="S")) == [True, True]


@pytest.mark.parametrize("empty", [None, "", [], {}, float("nan")])
def test_what_is_empty_is_as_good_as_not_given(empty):
    names = ("reasoning_content", "tool_calls", "name", "weight", "images", "anything")
    turn = ANSWER | dict.fromkeys(names, empty)
    part = NAMED | {"index": empty, "min_pixels": empty, "alt": empty}
    row = parse([{"role": "user", "content": [part, TEXT]}, turn], loss_mask=empty, weight=empty)
    assert row == parse([{"role": "user", "content": [NAMED, TEXT]}, ANSWER])


def user(*parts, **more):
    return [{"role": "user", "content": list(parts)} | more, ANSWER]


@pytest.mark.parametrize(
    ("messages", "column", "named"),
    [
        (user(NAMED, TEXT), {}, ["b.png"]),
        (user(NAMED, {"type": "image", "path": "a.png"}), {}, ["b.png", "a.png"]),
        (user({"type": "image", "url": "b.png"}, TEXT), {}, ["b.png"]),
        (user({"type": "image_url", "image_url": {"url": "b.png"}}, TEXT), {}, ["b.png"]),
        (user({"type": "image"}, TEXT), {"images": ["a.png"]}, ["a.png"]),
        (user(NAMED, TEXT), {"images": ["./b.png"]}, ["b.png"]),
        (user({"type": "image", "index": 0}, TEXT), {"images": ["a.png"]}, ["a.png"]),
        (user({"type": "image"}, NAMED), {"images": ["a.png", "b.png"]}, ["a.png", "b.png"]),
        ([USER | {"images": ["b.png"]}, ANSWER], {}, ["b.png"]),
        ([USER | {"images": ["b.png"]}, ANSWER], {"image": "b.png"}, ["b.png"]),
        ([{"role": "user", "content": "Q", "images": ["b.png"]}, ANSWER], {}, ["b.png"]),
        (user({"type": "text", "text": "see <image>"}), {"images": ["a.png"]}, ["a.png"]),
    ],
)
def test_the_picture_that_is_named_is_the_picture_of_the_row(messages, column, named):
    row = parse(messages, **column)
    assert paths(row) == named
    assert row.messages[0].content.count("<image>") == len(named)


@pytest.mark.parametrize(
    ("messages", "row", "reason", "message"),
    [
        ([USER, ANSWER | {"reasoning_content": "r"}], {}, "unsupported", "<think>"),
        ([USER, ANSWER | {"thinking": "r"}], {}, "unsupported", "thinking"),
        ([USER, ANSWER | {"tool_calls": [{}]}], {}, "unsupported", "tool_calls"),
        ([USER, ANSWER | {"function_call": {"name": "f"}}], {}, "unsupported", "function_call"),
        ([USER, ANSWER | {"prefix": True}], {}, "unsupported", "prefix"),
        ([USER | {"videos": ["v"]}, ANSWER], {}, "unsupported", "videos"),
        ([USER, ANSWER | {"weight": 0.5}], {}, "unsupported", "weight must be 0 or 1"),
        ([USER, ANSWER | {"loss": "no"}], {}, "unsupported", "loss must be 0 or 1"),
        ([USER, ANSWER | {"loss": False, "weight": 1}], {}, "bad_type", "contradict"),
        ([USER | {"weight": 1}, ANSWER], {}, "unsupported", "only turns of the assistant"),
        ([USER, ANSWER | {"weight": 0}], {}, "no_response", "to be learned"),
        (TWO, {"loss_mask": [0, 0, 0, 0]}, "no_response", "to be learned"),
        (TWO, {"loss_mask": [0, 1]}, "unsupported", "loss_mask must be a list of 4"),
        (TWO, {"loss_mask": [1, 1, 0, 1]}, "unsupported", r"loss_mask\[0\]"),
        (TWO, {"weight": 0.3}, "unsupported", "weight"),
        (TWO, {"trainable": False}, "no_response", "trainable"),
        (user(NAMED | {"text": "b"}, TEXT), {}, "unsupported", "text"),
        (user(NAMED, TEXT | {"image": "b.png"}), {}, "unsupported", "image"),
        (user(NAMED | {"detail": "high"}, TEXT), {}, "unsupported", "detail"),
        (user(NAMED, TEXT), {"images": ["a.png"]}, "image_mismatch", r"b\.png.*a\.png"),
        (user(NAMED, TEXT), {"images": [b"x"]}, "image_mismatch", "bytes"),
        (user(NAMED, NAMED), {"images": ["b.png", "a.png"]}, "image_mismatch", "picture 2"),
        (user(NAMED, NAMED), {"images": ["b.png"]}, "placeholders", "2 pictures"),
        (user(NAMED, {"type": "image"}), {}, "placeholders", "picture 2"),
        (user({"type": "image", "index": 1}), {"images": ["a.png"]}, "image_mismatch", "index"),
        ([USER | {"images": ["a.png", "b.png"]}, ANSWER], {}, "placeholders", "2 images"),
        ([USER | {"image": "b.png"}, ANSWER], {"image": "a.png"}, "image_mismatch", r"b\.png"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(messages, row, reason, message):
    with pytest.raises(records.RowError, match=message) as caught:
        parse(messages, **row)
    assert caught.value.reason == reason


TURNS = [{"role": "system", "content": "S"}, USER]


@pytest.mark.parametrize("text", [json.dumps(TURNS), json.dumps(json.dumps(TURNS))])
def test_turns_as_json_text_are_turns(text):
    assert prompt(text, image="a.png") == prompt(TURNS, image="a.png")
    assert parse(json.dumps([USER, ANSWER]), image="a.png") == parse([USER, ANSWER], image="a.png")
    one = {"teacher_response": "T", "student_response": "S", "image": "a.png"}
    pair = pairs.parse(one | {"prompt": json.dumps([USER])}, place=PLACE, source="s")
    assert pair == pairs.parse(one | {"prompt": "<image>Q"}, place=PLACE, source="s")


def test_content_as_json_text_of_parts_is_parts():
    turns = [{"role": "user", "content": json.dumps([NAMED, TEXT])}]
    row = prompt(turns)
    assert (row.prompt[0].content, paths(row)) == ("<image>Q", ["b.png"])


def test_turns_as_python_writes_them_are_refused_and_other_brackets_are_a_question():
    written = json.dumps(TURNS)
    # A table that limits its cells cuts the text anywhere.
    for value in (str(TURNS), written[:-3] + "]", written[:-1], written[:-8], written[:20]):
        with pytest.raises(records.RowError, match="looks like turns, but is not JSON"):
            prompt(value)
    for value in (
        "[1, 2] what is the sum?",
        '{"a": 1}',
        "[[1, 2], [3, 4]]",
        '{"role": what is it?',
        f"{written} is a chat. How many turns has it?",
    ):
        assert prompt(value).prompt[0].content == value
    with pytest.raises(records.RowError, match="one turn of the user"):
        pairs.parse(data_files.pair_row(0, prompt=[USER, USER]), place=PLACE, source="s")


@pytest.mark.parametrize(
    "text", [" " * 10**5 + "x", "[{" * 10**5, '[{"role":' + "] " * 10**5 + "x"]
)
def test_a_question_of_any_form_is_read_in_no_time(text):
    begun = time.process_time()
    row = prompt([{"role": "user", "content": text}])
    assert prompt(text).prompt == row.prompt
    assert time.process_time() - begun < 1


def test_the_columns_of_many_turns_are_read_whole():
    columns = {"role": ["user"], "content": ["<image>Q"], "images": [["b.png"]]}
    assert paths(prompt(columns)) == ["b.png"]
    with pytest.raises(records.RowError, match="tool_calls"):
        prompt({"role": ["user"], "content": ["Q"], "tool_calls": [[{"x": 1}]]})


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *((3.0, "3"), (3, "3"), ("3.0", "3.0"), (10**400, str(10**400))),
        *((float("nan"), "f.json:1"), (None, "f.json:1"), ("  ", "f.json:1")),
    ],
)
def test_a_whole_number_is_an_id_and_a_gap_is_none(value, number):
    assert fields.row_id({"id": value}, PLACE) == number
