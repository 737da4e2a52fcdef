"""MMMU validation: 900 questions of 30 subjects, with up to seven pictures in the text.

Source: PRISM scripts/eval/tasks/mmmu/utils.py `construct_prompt`, `mmmu_doc_to_messages`.
"""

import re
from collections.abc import Sequence

from prism_jax.data import fields, records
from prism_jax.data.benchmarks import layout
from prism_jax.rewards.benchmarks import facts as facts_lib

_CHOOSE = "Answer with the option's letter from the given choices directly."
_OPEN = "Answer the question using a single word or phrase."
_PICTURE = re.compile(r"<image (\d+)>")
_SUBJECT = re.compile(r"[^_]+_(.+)_\d+")
PICTURES = tuple(f"image_{number}" for number in range(1, 8))


def _read(row: layout.Row, protocol: facts_lib.Protocol, place: records.Place) -> layout.Question:
    del protocol, place
    kind = layout.one_of(row, "question_type", ("multiple-choice", "open"))
    question = layout.unmarked(layout.text(row, "question"))
    choices = layout.texts_as_text(row, "options") if kind == "multiple-choice" else ()
    if choices:
        query = f"{question}\n{layout.listed(choices, '{}. {}')}\n\n{_CHOOSE}"
    else:
        query = f"{question}\n\n{_OPEN}"
    row_id = layout.text(row, "id")
    subject = _SUBJECT.fullmatch(row_id)
    if subject is None:
        raise records.RowError("unknown_value", f"id must be SPLIT_SUBJECT_NUMBER, got {row_id!r}")
    numbers = picture_numbers(query)
    return layout.Question(
        id=row_id,
        user=interleaved(query, len(numbers)),
        images=pictures_of(row, numbers),
        kind=subject[1],
        answer=layout.letter(row, "answer", choices) if choices else layout.text(row, "answer"),
        judged_question=query,
        answer_type=kind,
        choices=choices,
    )


def picture_numbers(query: str) -> list[str]:
    """Return the numbers of the pictures that a text names, each once, in order of their names."""
    return sorted(set(_PICTURE.findall(query)))


def pictures_of(row: layout.Row, numbers: Sequence[str]) -> tuple[records.Image, ...]:
    """Return the pictures with these numbers."""
    images = []
    for number in numbers:
        name = f"image_{number}"
        if name not in PICTURES or fields.is_blank(row.get(name)):
            raise records.RowError("no_image", f"the text names <image {number}>, not in {name!r}")
        images.append(layout.image(row, name))
    return tuple(images)


def interleaved(query: str, num_pictures: int) -> str:
    """Return a text with marks in the places where the published evaluation shows the pictures.

    It shows the pictures in order of their names, one at each name in the text. A text that names a
    picture twice therefore loses the part between its last picture and its last name.
    """
    texts = [text.strip() for text in _PICTURE.sub(records.IMAGE_MARK, query).split("<image>")]
    return "".join(f"{text}{records.IMAGE_MARK}" for text in texts[:num_pictures]) + texts[-1]


LAYOUT = layout.Layout(
    name="mmmu",
    published="lmms-lab/MMMU",
    split="validation",
    folders=None,
    columns=frozenset(("id", "question", "options", "answer", "question_type", *PICTURES)),
    optional=frozenset(("explanation", "img_type", "topic_difficulty", "subfield")),
    max_tokens={"prism": 8192, "upstream": 128},
    read=_read,
)
