"""Teacher and student texts for the discriminator's warm-up, both published variants.

  {"prompt", "image", "teacher_caption", "student_caption", "teacher_cot", "student_cot"}
  {"prompt", "image", "teacher_response", "student_response"}

`prompt` may be called `question` or `problem`, and may be a single turn of the user; `image` and
`video` are optional.

Source: PRISM moe/train_moe_vl_warmup_fast.py:104-155.
"""

from collections.abc import Mapping
from typing import Any

from prism_jax.data import clips, fields, pictures, records, turns

SEGMENTS = ("teacher_caption", "student_caption", "teacher_cot", "student_cot")
RESPONSES = ("teacher_response", "student_response")
_ROLES = {"user": "user"}


def parse(row: Mapping[str, Any], *, place: records.Place, source: str) -> records.PairRow:
    """Read a row; as in the published reader, whole responses count only without segments.

    If the prompt does not mark the picture or video, the mark is put in front.
    """
    fields.no_other_media(row)
    prompt, named, clip_names = _prompt(row)
    images = pictures.of_marks(named, pictures.of_row(row))
    videos = clips.of_marks(clip_names, clips.of_row(row))
    for kind, given in (("image", images), ("video", videos)):
        if len(given) > 1:
            raise records.RowError(
                "placeholders", f"a pair has at most one {kind}, got {len(given)}"
            )
    names = SEGMENTS
    if fields.is_blank(row.get("teacher_caption")) and fields.is_blank(row.get("teacher_cot")):
        names = RESPONSES
    texts = {name: fields.optional_text(row, name) for name in names}
    missing = [name for name, text in texts.items() if text is None]
    if missing:
        raise records.RowError("missing_segment", f"missing or empty: {', '.join(missing)}")
    return records.PairRow(
        id=fields.row_id(row, place),
        source=source,
        prompt=fields.mark_media(prompt, len(images), len(videos)),
        image=images[0] if images else None,
        video=videos[0] if videos else None,
        **(dict.fromkeys(SEGMENTS + RESPONSES) | texts),
    )


def _prompt(
    row: Mapping[str, Any],
) -> tuple[str, tuple[records.Image | None, ...], tuple[records.Video | None, ...]]:
    """Return the prompt's text, its pictures and its videos; turns must be one turn of the user."""
    name, value = fields.prompt(row)
    if isinstance(value, str):
        as_turns = fields.turns_in_text(value, name)
        if as_turns is None:
            return fields.check_text(value, name), (), ()
        value = as_turns
    if isinstance(value, Mapping):
        value = [value]
    conversation = turns.read(value, name, role_tag="role", content_tag="content", roles=_ROLES)
    if len(conversation.messages) > 1:
        raise records.RowError(
            "unsupported",
            f"{name} of a pair must be one turn of the user, got {len(conversation.messages)}",
        )
    return conversation.messages[0].content, conversation.pictures, conversation.videos
