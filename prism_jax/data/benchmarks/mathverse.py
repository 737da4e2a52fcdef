"""MathVerse testmini: 788 problems in five versions, which say more or less in the picture.

Source: PRISM scripts/eval/tasks/mathverse/utils.py: the published `query_wo` as it is.
"""

from prism_jax.data import fields, records
from prism_jax.data.benchmarks import layout
from prism_jax.rewards.benchmarks import facts as facts_lib

_VERSIONS = (
    "Text Dominant",
    "Text Lite",
    "Vision Intensive",
    "Vision Dominant",
    "Vision Only",
    "Text Only",
)


def _read(row: layout.Row, protocol: facts_lib.Protocol, place: records.Place) -> layout.Question:
    del protocol, place
    kind = layout.one_of(row, "question_type", ("multi-choice", "free-form"))
    version = layout.one_of(row, "problem_version", _VERSIONS)
    # A problem without its picture has none.
    images = () if fields.is_blank(row["image"]) else (layout.image(row, "image"),)
    return layout.Question(
        id=layout.text(row, "sample_index"),
        user=layout.shown(images, layout.text(row, "query_wo").strip()),
        images=images,
        kind=version,
        answer=layout.text(row, "answer"),
        judged_question=layout.text(row, "question_for_eval"),
        answer_type=kind,
        group={"problem": layout.text(row, "problem_index")},
    )


LAYOUT = layout.Layout(
    name="mathverse",
    published="CaraJ/MathVerse-lmmseval",
    split="testmini",
    # Beside the split lie its parts by version.
    folders=("", "data", "testmini"),
    columns=frozenset(
        "sample_index problem_index problem_version question image answer question_type query_wo "
        "question_for_eval".split()
    ),
    optional=frozenset(("query_cot", "metadata")),
    max_tokens={"prism": 16384, "upstream": 16384},
    read=_read,
)
