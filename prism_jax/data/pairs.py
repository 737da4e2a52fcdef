"""Teacher and student texts for the discriminator's warm-up, both published variants.

  {"prompt", "image", "teacher_caption", "student_caption", "teacher_cot", "student_cot"}
  {"prompt", "image", "teacher_response", "student_response"}

`prompt` may be called `question`, `image` is optional.

Source: PRISM moe/train_moe_vl_warmup_fast.py:104-155.
"""

from collections.abc import Mapping
from typing import Any

from prism_jax.data import fields, records

SEGMENTS = ("teacher_caption", "student_caption", "teacher_cot", "student_cot")
RESPONSES = ("teacher_response", "student_response")


def parse(row: Mapping[str, Any], *, place: records.Place, source: str) -> records.PairRow:
    """Read one row; as in the published reader the whole responses count only without segments.

    The picture is marked in front of the prompt where the prompt does not mark it.
    """
    fields.no_other_media(row)
    prompt = fields.optional_text(row, "prompt") or fields.optional_text(row, "question")
    if prompt is None:
        raise records.RowError("empty_prompt", "'prompt' (or 'question') is missing or empty")
    images = fields.images(row)
    if len(images) > 1:
        raise records.RowError("placeholders", f"a pair has at most one image, got {len(images)}")
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
        prompt=fields.mark_images(prompt, len(images)),
        image=images[0] if images else None,
        **(dict.fromkeys(SEGMENTS + RESPONSES) | texts),
    )
