"""Segments by each form: what is read of teacher and student, and where it is scored."""

import numpy as np
import pytest

from prism_jax.data import processor
from prism_jax.discriminator import segments
from prism_jax.policy import responses
from prism_jax.rewards import tags
from tests import tiny_checkpoint

_CAPTION, _COT = "<caption>数字 3 と 5</caption>", "<think>3 + 5</think><answer>8</answer>"
_TEXT = segments.Text.of_parts(_CAPTION, _COT)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return processor.Processor.from_folder(
        tiny_checkpoint.write(tmp_path_factory.mktemp("segments") / "model")
    )


def _reader(words, *, view="caption_cot", scored_token="last", limit=None):
    form = segments.Form(view=view, scored_token=scored_token, teacher_max_tokens=limit)
    return segments.Reader(words, vocab_tokens=None, gate="strict", form=form)


def _ids(words, text):
    return words.tokenizer(text, add_special_tokens=False)["input_ids"]


def _drawn(words, reader, text):
    """Return the segments of a response that a policy wrote."""
    tokens = np.array([*_ids(words, text), words.tokenizer.eos_token_id], np.int32)
    gate = responses.Reader.of(words, vocab_tokens=None, gate="strict")
    found = tags.segment(
        tokens.tolist(),
        bytes_of_token=gate.bytes_of_token,
        end_tokens=gate.end_tokens,
        gate="strict",
    )
    return reader.cut(tokens, found)


@pytest.mark.parametrize("view", segments.VIEWS)
@pytest.mark.parametrize("scored_token", ["last", "newline"])
def test_teacher_and_student_end_with_the_same_token_in_every_view(words, view, scored_token):
    reader = _reader(words, view=view, scored_token=scored_token)
    teacher, student = reader.teacher(_TEXT), reader.student(_TEXT)
    drawn = _drawn(words, reader, _TEXT.response)
    assert set(teacher.tokens) == set(segments.VIEWS[view])
    for name in segments.VIEWS[view]:
        ends = {int(cut.tokens[name][-1]) for cut in (teacher, student, drawn)}
        assert len(ends) == 1, name


def test_the_whole_response_is_the_caption_and_the_cot(words):
    cut = _reader(words, view="both").teacher(_TEXT)
    parts = np.concatenate([cut.tokens["caption"], cut.tokens["cot"]])
    np.testing.assert_array_equal(cut.tokens["response"], parts)
    assert words.decode(cut.tokens["caption"]).startswith(_CAPTION)
    assert cut.tokens["cot"][-1] == words.tokenizer.eos_token_id


def test_a_response_with_its_parts_and_one_without_them_are_cut_alike(words):
    reader = _reader(words)
    one, other = reader.teacher(_TEXT), reader.teacher(segments.Text.of_whole(_TEXT.response))
    for name in ("caption", "cot"):
        np.testing.assert_array_equal(one.tokens[name], other.tokens[name])


def test_newline_scores_the_line_break_of_the_template_behind_each_segment(words):
    reader = _reader(words, scored_token="newline")
    tail = [words.tokenizer.eos_token_id, *_ids(words, "\n")]
    for cut in (reader.teacher(_TEXT), reader.student(_TEXT)):
        assert cut.tokens["caption"].tolist() == [*_ids(words, _CAPTION), *tail]
        assert cut.tokens["cot"].tolist() == [*_ids(words, _COT), *tail]
    drawn = _drawn(words, reader, _TEXT.response)
    assert drawn.tokens["caption"].tolist()[-len(tail) :] == tail
    assert drawn.tokens["cot"].tolist()[-len(tail) :] == tail


def test_pad_scores_the_teacher_on_padding_and_the_student_on_its_own_end(words):
    reader = _reader(words, scored_token="pad")
    teacher, drawn = reader.teacher(_TEXT), _drawn(words, reader, _TEXT.response)
    assert teacher.tokens["caption"].tolist() == [*_ids(words, _CAPTION), words.ids.pad]
    assert teacher.tokens["cot"].tolist() == [*_ids(words, _COT), words.ids.pad]
    assert drawn.tokens["cot"][-1] == words.tokenizer.eos_token_id != words.ids.pad


@pytest.mark.parametrize("scored_token", ["last", "pad"])
def test_a_teacher_that_reaches_its_limit_is_scored_on_the_last_token_that_is_left(
    words, scored_token
):
    own = _reader(words, scored_token=scored_token)
    size = len(own.teacher(_TEXT).tokens["cot"]) - (scored_token == "pad")
    for limit, is_cut in ((size, False), (size - 1, True)):
        cut = _reader(words, scored_token=scored_token, limit=limit).teacher(_TEXT)
        expected = own.teacher(_TEXT).tokens["cot"][:limit]
        np.testing.assert_array_equal(cut.tokens["cot"], expected)
        assert ("cot" in cut.shortened) == is_cut
    # A student has no limit of its own.
    short = _reader(words, scored_token=scored_token, limit=2)
    assert len(short.student(_TEXT).tokens["cot"]) > 2
