"""Prompts with answers and teacher texts: the columns of the RL parquet, and plain JSON lines.

  prompt        turns (list of {role, content}, one such dict, a dict of lists, or any of these as
                JSON text), or a string; it may be called `question` or `problem`
  images        pictures, marked by `<image>` in the turns; JSON lines may say `image`
  videos        videos, marked by `<video>`; JSON lines may say `video`
  reward_model  {ground_truth, equivalent_answers?} as a struct or JSON text;
                plain rows say `ground_truth` or `answer`; a number is read as text
  teacher_response, teacher_caption, teacher_cot, data_source, extra_info, id   optional

Source: PRISM verl/verl/utils/dataset/rl_dataset.py:270-430 and
verl/verl/utils/reward_score/math_verify_with_format.py:81.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from prism_jax.data import clips, fields, pictures, records, turns

_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}


def parse(row: Mapping[str, Any], *, place: records.Place, source: str) -> records.PromptRow:
    """Read a row.

    A prompt given as a string is a user turn; if it does not mark its pictures or videos, the marks
    are put in front. Turns must mark theirs. A string that holds turns as JSON is read as turns.
    """
    fields.no_other_media(row)
    column, videos = pictures.of_row(row), clips.of_row(row)
    ground_truth, equivalent = _answers(row)
    caption, cot = (fields.optional_text(row, name) for name in ("teacher_caption", "teacher_cot"))
    if (caption is None) != (cot is None):
        missing = "teacher_caption" if caption is None else "teacher_cot"
        raise records.RowError("missing_segment", f"{missing} is missing or empty")
    prompt = _turns(row, len(column), len(videos))
    return records.PromptRow(
        id=fields.row_id(row, place),
        source=source,
        prompt=prompt.messages,
        images=pictures.of_marks(prompt.pictures, column),
        videos=clips.of_marks(prompt.videos, videos),
        teacher_response=fields.optional_text(row, "teacher_response"),
        teacher_caption=caption,
        teacher_cot=cot,
        data_source=fields.optional_text(row, "data_source"),
        ground_truth=ground_truth,
        equivalent_answers=equivalent,
        extra_info=fields.extra_info(row),
    )


def _turns(row: Mapping[str, Any], num_images: int, num_videos: int) -> turns.Turns:
    name, value = fields.prompt(row)
    if isinstance(value, str):
        as_turns = fields.turns_in_text(value, name)
        if as_turns is None:
            text = fields.mark_media(fields.check_text(value, name), num_images, num_videos)
            message = records.Message(role="user", content=text)
            return turns.Turns(messages=(message,), pictures=(), videos=())
        value = as_turns
    if isinstance(value, Mapping):
        value = _list_of_turns(value, name)
    conversation = turns.read(value, name, role_tag="role", content_tag="content", roles=_ROLES)
    # A prompt has no learned turns, so flags about learning are ignored.
    messages = tuple(dataclasses.replace(turn, is_learned=True) for turn in conversation.messages)
    return dataclasses.replace(conversation, messages=messages)


def _list_of_turns(value: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the turns of a dict: a single turn, or columns of turns, the form of some writers."""
    role = value.get("role")
    if not isinstance(role, list):
        return [dict(value)]
    columns = {
        key: column
        for key, column in value.items()
        if key in ("role", "content") or not fields.is_blank(column)
    }
    for key, column in columns.items():
        if not isinstance(column, list) or len(column) != len(role):
            got = len(column) if isinstance(column, list) else type(column).__name__
            raise records.RowError("bad_type", f"{name} has {len(role)} roles, but {key}: {got}")
    return [{key: column[i] for key, column in columns.items()} for i in range(len(role))]


def _answers(row: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """Return the ground truth and its equivalents, from `reward_model` before plain columns."""
    model = fields.json_object(row.get("reward_model"), "reward_model")
    ground_truth = None
    for place, name in ((model, "ground_truth"), (row, "ground_truth"), (row, "answer")):
        value = place.get(name)
        if value is not None and (isinstance(value, str) or not fields.is_blank(value)):
            ground_truth = _ground_truth(value, name)
            break
    values = model.get("equivalent_answers")
    values = row.get("equivalent_answers") if values is None else values
    if fields.is_blank(values):
        return ground_truth, ()
    if not isinstance(values, list):
        raise records.RowError(
            "bad_type", f"equivalent_answers must be a list, got {fields.show(values)}"
        )
    texts = [fields.answer_text(v, f"equivalent_answers[{i}]") for i, v in enumerate(values)]
    if records.NO_EQUIVALENT in texts:
        return ground_truth, ()
    return ground_truth, tuple(text for text in texts if text.strip())


def _ground_truth(value: Any, name: str) -> str:
    text = fields.answer_text(value, name)
    if not text.strip():
        raise records.RowError("empty_answer", f"{name!r} is empty")
    if text.lstrip().startswith("{"):
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if isinstance(content, dict) and content:
            raise records.RowError(
                "bad_answer", f"{name} must be the answer alone, got JSON {fields.show(text)}"
            )
    return text
