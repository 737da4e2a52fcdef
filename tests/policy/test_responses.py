"""Sampled tokens to texts, segments and tasks."""

import dataclasses
import pathlib

import numpy as np
import pytest

from prism_jax.data import build, processor, prompt_files, records, sources, validate
from prism_jax.policy import responses
from prism_jax.rewards import score, symbolic, tags
from prism_jax.rollout import engine
from tests import data_files, make_tokenizer

_TEXT = "<caption>\nA 7.\n</caption>\n<think>\n7\n</think>\n<answer>\n7\n</answer>"


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> processor.Processor:
    folder = pathlib.Path(tmp_path_factory.mktemp("responses"))
    make_tokenizer.write_config(folder, make_tokenizer.write(folder))
    return processor.Processor.from_folder(folder)


def _rollout(words, *responses_: list[int], end: bool = True) -> engine.Rollout:
    ends = [words.tokenizer.eos_token_id] if end else []
    rows = [[*ids, *ends] for ids in responses_]
    tokens = np.zeros((len(rows), max(map(len, rows)) + 2), np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return engine.Rollout(
        tokens=tokens,
        logprobs=np.zeros(tokens.shape, np.float32),
        lengths=np.array([len(row) for row in rows], np.int32),
        ended=np.full(len(rows), end),
    )


def _reader(words, **changes) -> responses.Reader:
    return responses.Reader.of(words, **({"vocab_tokens": None, "gate": "strict"} | changes))


def _row(**changes) -> records.PromptRow:
    row = records.PromptRow(
        id="a",
        source="s",
        prompt=(records.Message(role="user", content="How many?"),),
        images=(),
        teacher_response=None,
        teacher_caption=None,
        teacher_cot=None,
        data_source=None,
        ground_truth="7",
        equivalent_answers=("seven",),
        extra_info={},
    )
    return dataclasses.replace(row, **changes)


def test_segments_are_those_of_the_text_and_count_the_end_token(words):
    ids = words.tokenizer.encode(_TEXT)
    (one,) = _reader(words).read(_rollout(words, ids))
    assert one.text == _TEXT
    assert (one.caption, one.cot) == (_TEXT[:25], _TEXT[25:])
    assert one.caption.endswith("</caption>")
    assert one.response_tokens == len(ids) + 1
    assert (one.ended, one.format_ok) == (True, True)


def test_special_tokens_are_not_part_of_the_text_as_in_the_tokenizers_own(words):
    ids = words.tokenizer.encode(_TEXT)
    at = len(words.tokenizer.encode("<caption>\nA"))
    ids = [*ids[:at], words.ids.image, *ids[at:]]
    (one,) = _reader(words).read(_rollout(words, ids))
    assert one.text == _TEXT == words.decode(ids)
    assert one.format_ok
    assert one.response_tokens == len(ids) + 1


def test_a_row_of_the_vocabulary_without_a_token_shows(words):
    size = max(words.tokenizer.get_vocab().values()) + 1
    ids = [*words.tokenizer.encode("a"), size + 1]
    (one,) = _reader(words, vocab_tokens=size + 2).read(_rollout(words, ids))
    assert one.text == "a\ufffd"


def test_a_cut_response_has_a_text_and_no_segments(words):
    (one,) = _reader(words).read(_rollout(words, words.tokenizer.encode(_TEXT), end=False))
    assert one.text == _TEXT
    assert (one.ended, one.format_ok, one.cot_tokens) == (False, False, 0)


def test_a_sampler_with_other_end_tokens_is_found_out(words):
    rollout = _rollout(words, words.tokenizer.encode("a"), end=False)
    with pytest.raises(ValueError, match="end tokens"):
        _reader(words).read(dataclasses.replace(rollout, ended=np.array([True])))


def test_each_response_is_judged_against_its_own_row(words):
    ids = [words.tokenizer.encode(text) for text in ("a", "b", "c", "d")]
    found = _reader(words).read(_rollout(words, *ids))
    rows = [_row(), _row(id="b", ground_truth="8", data_source="numerals")]
    tasks = responses.tasks(rows, found, num_responses=2)
    assert [task.response for task in tasks] == ["a", "b", "c", "d"]
    assert [task.ground_truth for task in tasks] == ["7", "7", "8", "8"]
    assert [task.data_source for task in tasks] == ["", "", "numerals", "numerals"]
    assert all(task.ended for task in tasks)
    assert tasks[0].equivalent_answers == ("seven",)


def _copy_of(source: sources.Source, how: str, folder: pathlib.Path) -> sources.Source:
    """Return the source as it is, built into a folder, or read and written as parquet again."""
    if how == "built":
        build.build(source, str(folder / "built"), validate.Rules())
        return dataclasses.replace(source, path=str(folder / "built"))
    if how == "written":
        rows, _ = data_files.read_all(source)
        prompt_files.write(
            folder / "again.parquet",
            rows,
            infos=[row.extra_info for row in rows],
            has_scales=False,
            has_videos=False,
        )
        return dataclasses.replace(source, path=str(folder / "again.parquet"))
    return source


@pytest.mark.parametrize("how", ["file", "built", "written"])
@pytest.mark.parametrize("judge", ["strict", "official"])
def test_the_marker_in_a_file_voids_the_whole_list_of_equivalents(tmp_path, how, judge):
    lists = (["1/2"], ["1/2", "__EMPTY__"], ["__EMPTY__", "1/2"], ["__EMPTY__"], None)
    rows = [
        data_files.prompt_row(
            i,
            data_source="math-77k",
            reward_model={"style": "rule", "ground_truth": "7", "equivalent_answers": equivalents},
        )
        for i, equivalents in enumerate(lists)
    ]
    path = data_files.write_parquet(tmp_path / "rows.parquet", rows, group_rows=2)
    source = _copy_of(sources.Source(kind="prompts", path=str(path)), how, tmp_path)
    opened, _ = data_files.read_all(source)
    rule = score.Rule(judge=judge, accuracy_weight=0.8, format_weight=0.2)

    def accuracies(answer: str) -> list[float]:
        text = _TEXT.replace("<answer>\n7", f"<answer>\n{answer}")
        one = tags.Segments(
            text=text,
            format_ok=True,
            ended=True,
            caption_chars=0,
            caption_tokens=0,
            cot_tokens=0,
            response_tokens=0,
        )
        asked = responses.tasks(opened, [one] * len(opened), num_responses=1)
        return [score.grade(task, rule, symbolic.verify).accuracy for task in asked]

    # Only the list without the marker says that one half is right too; seven always is.
    assert accuracies("0.5") == [1, 0, 0, 0, 0]
    assert accuracies("7") == [1] * 5
