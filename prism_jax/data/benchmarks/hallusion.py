"""HallusionBench, the questions with a picture: 951 of yes or no, in figures and pairs.

Source: PRISM scripts/eval/tasks/hallusion_bench/evaluate_hb.py, hallusion_bench_image.yaml.
"""

from prism_jax.data import records
from prism_jax.data.benchmarks import layout
from prism_jax.rewards.benchmarks import facts as facts_lib


def _read(row: layout.Row, protocol: facts_lib.Protocol, place: records.Place) -> layout.Question:
    del protocol, place
    category = layout.one_of(row, "category", ("VD", "VS"))
    layout.one_of(row, "visual_input", ("0", "1", "2"))
    names = {"set": "set_id", "figure": "figure_id", "question": "question_id"}
    group = {"category": category, "subcategory": layout.text(row, "subcategory")}
    group |= {name: layout.text(row, column) for name, column in names.items()}
    question = layout.text(row, "question")
    picture = layout.image(row, "image")
    return layout.Question(
        id="_".join(group.values()),
        user=layout.shown([picture], question),
        images=(picture,),
        kind=f"{category} {group['subcategory']}",
        answer=layout.one_of(row, "gt_answer", ("0", "1")),
        judged_question=question,
        group=group | {"answer_in_words": layout.text(row, "gt_answer_details")},
    )


LAYOUT = layout.Layout(
    name="hallusion",
    published="lmms-lab/HallusionBench",
    split="image",
    folders=None,
    columns=frozenset(
        "category subcategory visual_input set_id figure_id question_id question gt_answer "
        "gt_answer_details image".split()
    ),
    optional=frozenset(("sample_note", "filename")),
    max_tokens={"prism": 8192, "upstream": 128},
    read=_read,
)
