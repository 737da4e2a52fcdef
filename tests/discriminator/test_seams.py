"""A caption ends in the same token whatever a policy writes behind it."""

import itertools
import pathlib

import numpy as np
import pytest

from prism_jax.data import encode, processor
from prism_jax.discriminator import segments
from prism_jax.rewards import tags
from tests import tiny_checkpoint

_BASE = pathlib.Path(__file__).parents[2] / "launch" / "demo_base"
_CAPTION = "<caption>\nRow 1: red 9.\n</caption>"
_COT = "<think>\nso 九\n</think>\n<answer>\n9\n</answer>"
_GAPS = ("", "\n", "\n\n", " ", "\n \n", "\r\n", "\t", " \n")


@pytest.fixture(scope="module", params=["demo", "tiny"])
def words(request, tmp_path_factory):
    if request.param == "demo":
        return processor.Processor.from_folder(_BASE)
    folder = tiny_checkpoint.write(tmp_path_factory.mktemp("seams") / "model")
    return processor.Processor.from_folder(folder)


def _reader(words, scored_token="last"):
    form = segments.Form(view="both", scored_token=scored_token, teacher_max_tokens=None)
    return segments.Reader(words, vocab_tokens=None, gate="strict", form=form)


def _drawn(words, reader, pieces):
    """Cut a response that was drawn as the tokens of these pieces, one after the other."""
    encoded = [words.token_ids(piece, add_special_tokens=False) for piece in pieces]
    tokens = [*itertools.chain.from_iterable(encoded), encode.TurnTokens.of(words.tokenizer).end]
    table = tags.token_bytes(words.tokenizer, vocab_tokens=None)
    found = tags.segment(tokens, bytes_of_token=table, end_tokens=words.ids.ends, gate="strict")
    assert found.format_ok
    return tokens, reader.cut(np.array(tokens, np.int32), found).tokens


def _said(words, tokens):
    return words.tokenizer.decode(tokens)


@pytest.mark.parametrize("gap", _GAPS, ids=repr)
@pytest.mark.parametrize("is_cut", [False, True], ids=["as written", "token by token"])
def test_both_sides_end_a_caption_and_begin_a_cot_with_the_same_tokens(words, gap, is_cut):
    reader = _reader(words)
    teacher = reader.teacher(segments.Text.of_parts(_CAPTION, _COT)).tokens
    pieces = [_CAPTION[:-1], ">", *gap, "<", _COT[1:]] if is_cut else [_CAPTION + gap + _COT]
    raw, student = _drawn(words, reader, pieces)
    assert student["caption"][-1] == teacher["caption"][-1]
    both = np.concatenate([student["caption"], student["cot"]])
    assert _said(words, both) == _said(words, [*words.token_ids(f"{_CAPTION}\n{_COT}"), raw[-1]])
    # The response of GAD is what was drawn.
    assert student["response"].tolist() == raw
    if not is_cut:
        assert {n: t.tolist() for n, t in student.items() if n != "response"} == {
            n: t.tolist() for n, t in teacher.items() if n != "response"
        }


@pytest.mark.parametrize("gap", _GAPS, ids=repr)
def test_a_teacher_from_a_file_is_read_alike_whatever_separates_its_parts(words, gap):
    reader = _reader(words)
    wanted = reader.teacher(segments.Text.of_parts(_CAPTION, _COT)).tokens
    for text in (
        segments.Text.of_parts(_CAPTION + gap, _COT),
        segments.Text.of_parts(_CAPTION, gap + _COT),
        segments.Text.of_whole(_CAPTION + gap + _COT),
    ):
        found = reader.teacher(text).tokens
        for name in ("caption", "cot"):
            np.testing.assert_array_equal(found[name], wanted[name])


def test_what_has_the_break_stays_as_it_was_drawn(words):
    reader = _reader(words)
    # Not the tokenizer's own way: letter by letter.
    raw, student = _drawn(words, reader, [*_CAPTION[:-1], f">\n{_COT}"])
    assert [*student["caption"], *student["cot"]] == raw


def test_the_released_form_of_a_student_is_verbatim(words):
    raw, student = _drawn(words, _reader(words, "pad"), [_CAPTION, _COT])
    assert [*student["caption"], *student["cot"]] == raw
