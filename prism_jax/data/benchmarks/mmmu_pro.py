"""MMMU-Pro test: 1730 questions with ten options, as text (standard) or in a picture (vision).

Source: PRISM scripts/eval/tasks/mmmu_pro/utils.py. The pictures of the standard form stand first;
the text keeps their names.
"""

from prism_jax.data import records
from prism_jax.data.benchmarks import layout, mmmu
from prism_jax.rewards.benchmarks import facts as facts_lib

_CHOOSE = "Answer with the option letter from the given choices directly."
_MAX_TOKENS = {"prism": 8192, "upstream": 256}


def _read_standard(
    row: layout.Row, protocol: facts_lib.Protocol, place: records.Place
) -> layout.Question:
    del protocol, place
    choices = layout.texts_as_text(row, "options")
    question = layout.text(row, "question")
    query = f"{question}\n{layout.listed(choices, '{}. {}')}\n\n{_CHOOSE}"
    images = mmmu.pictures_of(row, mmmu.picture_numbers(query))
    return layout.Question(
        id=layout.text(row, "id"),
        user=layout.shown(images, query),
        images=images,
        kind=layout.text(row, "subject"),
        answer=layout.letter(row, "answer", choices),
        judged_question=query,
        choices=choices,
    )


def _read_vision(
    row: layout.Row, protocol: facts_lib.Protocol, place: records.Place
) -> layout.Question:
    del place
    choices = layout.texts_as_text(row, "options")
    # PRISM repeats the options as text.
    query = f"{layout.listed(choices, '{}. {}')}\n\n{_CHOOSE}" if protocol == "prism" else _CHOOSE
    picture = layout.image(row, "image")
    return layout.Question(
        id=layout.text(row, "id"),
        user=layout.shown([picture], query),
        images=(picture,),
        kind=layout.text(row, "subject"),
        answer=layout.letter(row, "answer", choices),
        judged_question="",  # the question is in the picture, which a judge does not see
        choices=choices,
    )


STANDARD = layout.Layout(
    name="mmmu_pro_standard",
    published="MMMU/MMMU_Pro",
    split="test",
    folders=("standard (10 options)",),
    columns=frozenset(("id", "question", "options", "answer", "subject", *mmmu.PICTURES)),
    optional=frozenset(("explanation", "img_type", "topic_difficulty")),
    max_tokens=_MAX_TOKENS,
    read=_read_standard,
)
VISION = layout.Layout(
    name="mmmu_pro_vision",
    published="MMMU/MMMU_Pro",
    split="test",
    folders=("vision",),
    columns=frozenset(("id", "image", "options", "answer", "subject")),
    optional=frozenset(),
    max_tokens=_MAX_TOKENS,
    read=_read_vision,
)
