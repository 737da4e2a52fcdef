"""MathVista testmini: 1000 questions about charts, figures and scenes, with four kinds of answer.

Source: PRISM scripts/eval/tasks/mathvista/mathvista_evals.py `create_one_query`, step-by-step.
"""

from prism_jax.data import fields, records
from prism_jax.data.benchmarks import layout
from prism_jax.rewards.benchmarks import facts as facts_lib

_HINTS = {
    "text": "answer the question and provide the correct option letter, e.g., A, B, C, D, at the "
    "end.",
    "integer": "answer the question requiring an integer answer and provide the final value, "
    "e.g., 1, 2, 3, at the end.",
    "float1": "answer the question requiring a floating-point number with one decimal place and "
    "provide the final value, e.g., 1.2, 1.3, 1.4, at the end.",
    "float2": "answer the question requiring a floating-point number with two decimal places and "
    "provide the final value, e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "answer the question requiring a Python list as an answer and provide the final list, "
    "e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
}
_OPEN_TYPES = ("integer", "float", "list")


def _read(row: layout.Row, protocol: facts_lib.Protocol, place: records.Place) -> layout.Question:
    del protocol, place  # both protocols ask alike
    kind = layout.one_of(row, "question_type", ("multi_choice", "free_form"))
    choices = layout.texts(row["choices"], "choices")
    if (kind == "multi_choice") != bool(choices):
        raise records.RowError(
            "unknown_value", f"question_type is {kind}, but there are {len(choices)} choices"
        )
    answer_type = layout.one_of(row, "answer_type", ("text",) if choices else _OPEN_TYPES)
    precision = _precision(row) if answer_type == "float" else None
    answer = layout.text(row, "answer")
    if choices and answer.strip() not in [choice.strip() for choice in choices]:
        raise records.RowError("unknown_value", f"answer {answer!r:.80} is none of the choices")
    query = _query(row, choices, _HINTS[f"{answer_type}{precision or ''}"])
    picture = layout.image(row, "decoded_image")
    return layout.Question(
        id=layout.text(row, "pid"),
        user=layout.shown([picture], query),
        images=(picture,),
        kind=_task(row),
        answer=answer,
        judged_question=layout.text(row, "query"),
        answer_type=answer_type,
        choices=choices,
        precision=precision,
    )


def _query(row: layout.Row, choices: tuple[str, ...], hint: str) -> str:
    question = f"Question: {layout.text(row, 'question')}"
    unit = layout.optional_text(row, "unit")
    lines = [question + (f" (Unit: {unit})" if unit else "")]
    if choices:
        lines += ["Choices:", layout.listed(choices, "({}) {}")]
    return "\n".join([*lines, f"Hint: Please {hint}"])


def _precision(row: layout.Row) -> int:
    """Return the decimal places of a number: 1 or 2, published as a fraction."""
    value = row["precision"]
    if value not in (1, 2):
        raise records.RowError(
            "unknown_value", f"precision must be 1 or 2 for a float, got {fields.show(value)}"
        )
    return int(value)


def _task(row: layout.Row) -> str:
    metadata = row["metadata"]
    task = metadata.get("task") if isinstance(metadata, dict) else None
    if not isinstance(task, str) or not task:
        raise records.RowError("bad_type", f"metadata must have a task, got {metadata!r:.80}")
    return task


LAYOUT = layout.Layout(
    name="mathvista",
    published="AI4Math/MathVista",
    split="testmini",
    folders=None,
    columns=frozenset(
        "pid question decoded_image choices unit precision answer question_type answer_type "
        "metadata query".split()
    ),
    optional=frozenset(("image",)),  # the name of the picture's file
    max_tokens={"prism": 16384, "upstream": 16384},
    read=_read,
)
