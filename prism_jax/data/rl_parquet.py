"""Prompts with answers and teacher texts: the columns of the RL parquet, and plain JSON lines.

  prompt        turns (list of {role, content}, one such dict, or a dict of lists), or a string
  images        pictures, marked by `<image>` in the turns; JSON lines may say `image`
  reward_model  {ground_truth, equivalent_answers?} as a struct or JSON text;
                plain rows say `ground_truth` or `answer`
  teacher_response, teacher_caption, teacher_cot, data_source, extra_info, id   optional

Source: PRISM verl/verl/utils/dataset/rl_dataset.py:270-430 and
verl/verl/utils/reward_score/math_verify_with_format.py:81.
"""

from collections.abc import Mapping
from typing import Any

from prism_jax.data import fields, records

_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
# The published files write this where a row has no equivalent answer. In a list with others it
# voids them too, as the released reward reads it.
_VOID = "__EMPTY__"


def parse(row: Mapping[str, Any], *, place: records.Place, source: str) -> records.PromptRow:
    """Read one row.

    A prompt given as a string is one user turn, its pictures marked in front where it does not
    mark them; turns must mark theirs.
    """
    fields.no_other_media(row)
    images = fields.images(row)
    ground_truth, equivalent = _answers(row)
    caption, cot = (fields.optional_text(row, name) for name in ("teacher_caption", "teacher_cot"))
    if (caption is None) != (cot is None):
        missing = "teacher_caption" if caption is None else "teacher_cot"
        raise records.RowError("missing_segment", f"{missing} is missing or empty")
    return records.PromptRow(
        id=fields.row_id(row, place),
        source=source,
        prompt=_turns(row, len(images)),
        images=images,
        teacher_response=fields.optional_text(row, "teacher_response"),
        teacher_caption=caption,
        teacher_cot=cot,
        data_source=fields.optional_text(row, "data_source"),
        ground_truth=ground_truth,
        equivalent_answers=equivalent,
        extra_info=fields.json_object(row.get("extra_info"), "extra_info"),
    )


def _turns(row: Mapping[str, Any], num_images: int) -> tuple[records.Message, ...]:
    name = "question" if fields.is_blank(row.get("prompt")) else "prompt"
    value = row.get(name)
    if fields.is_blank(value):
        raise records.RowError("empty_prompt", "'prompt' (or 'question') is missing or empty")
    if isinstance(value, str):
        text = fields.mark_images(fields.check_text(value, name), num_images)
        return (records.Message(role="user", content=text),)
    if isinstance(value, Mapping):
        value = _list_of_turns(value, name)
    return fields.messages(value, name, role_tag="role", content_tag="content", roles=_ROLES)


def _list_of_turns(value: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the turns of a dict: one turn, or the columns of many as some writers store a list."""
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, list):
        return [dict(value)]
    if not isinstance(content, list) or len(content) != len(role):
        got = len(content) if isinstance(content, list) else type(content).__name__
        raise records.RowError("bad_type", f"{name} has {len(role)} roles, but content: {got}")
    return [{"role": r, "content": c} for r, c in zip(role, content, strict=True)]


def _answers(row: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """Return the ground truth and its equivalents; those of `reward_model` before plain columns."""
    model = fields.json_object(row.get("reward_model"), "reward_model")
    ground_truth = None
    for place, name in ((model, "ground_truth"), (row, "ground_truth"), (row, "answer")):
        if place.get(name) is not None:
            ground_truth = fields.check_text(place[name], name)
            if not ground_truth.strip():
                raise records.RowError("empty_answer", f"{name!r} is empty")
            break
    values = model.get("equivalent_answers")
    values = row.get("equivalent_answers") if values is None else values
    if fields.is_blank(values):
        return ground_truth, ()
    if not isinstance(values, list):
        raise records.RowError("bad_type", f"equivalent_answers must be a list, got {values!r:.60}")
    texts = [fields.check_text(v, f"equivalent_answers[{i}]") for i, v in enumerate(values)]
    if _VOID in texts:
        return ground_truth, ()
    return ground_truth, tuple(text for text in texts if text.strip())
