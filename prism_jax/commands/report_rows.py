"""The prompts of an evaluation as a report shows them."""

import os
from collections.abc import Collection

from prism_jax.data import images, records, sources, validate
from prism_jax.report import examples

_MAX_PICTURE_PIXELS = 640  # of the longer side


def read(path: str, image_root: str | None, ids: Collection[str]) -> dict[str, records.PromptRow]:
    """Return rows of a test split by id; none when the split is gone."""
    # Unlike `Path.exists` it answers no to a name that no file can have.
    if not os.path.exists(path):
        return {}
    source = sources.Source(kind="prompts", path=path, image_root=image_root)
    # The evaluation has read these rows, so one that is wrong now is left out, not refused.
    opened = sources.open_source(source, validate.Rules(max_bad_rows=10**9), cache_dir=None)
    rows = {}
    for number in range(len(opened.rows)):
        row = opened.rows[number]
        if row.id in ids:
            rows[row.id] = row
        if len(rows) == len(ids):
            break
    return rows


def question(row: records.PromptRow) -> str:
    """Return the text of a row's last question, without its marks."""
    turns = [turn.content for turn in row.prompt if turn.role == "user"]
    return records.without_marks(turns[-1]).strip()


def picture(image: records.Image) -> examples.Picture:
    """Return a picture, a large one made smaller."""
    png, width, height = images.thumbnail(image, side_pixels=_MAX_PICTURE_PIXELS)
    return examples.Picture(png=png, width=width, height=height)
