"""MathVision testmini: 304 questions of competitions, with options or a value as the answer.

Source: PRISM scripts/eval/tasks/mathvision/utils.py; its instruction is glued to the question.
"""

from prism_jax.data import records
from prism_jax.data.benchmarks import layout
from prism_jax.rewards.benchmarks import facts as facts_lib

_INSTRUCTIONS = {
    "prism": "Please solve the problem step by step and put your final answer in "
    "<answer></answer> tags.",
    "upstream": 'Please solve the problem step by step and put your answer in one "\\boxed{}".',
}
_CHOOSE = "Answer the question with the option's letter from the given choices directly."


def _read(row: layout.Row, protocol: facts_lib.Protocol, place: records.Place) -> layout.Question:
    del place
    choices = layout.texts(row["options"], "options")
    answer = layout.letter(row, "answer", choices) if choices else layout.text(row, "answer")
    question = layout.text(row, "question")
    query = _INSTRUCTIONS[protocol] + question
    if choices:
        query += f"\nChoices: {layout.listed(choices, '{}. {}')}\n{_CHOOSE}"
    picture = layout.image(row, "decoded_image")
    return layout.Question(
        id=layout.text(row, "id"),
        user=layout.shown([picture], query),
        images=(picture,),
        kind=layout.text(row, "subject"),
        answer=answer,
        judged_question=question,
        choices=choices,
    )


LAYOUT = layout.Layout(
    name="mathvision",
    published="MathLLMs/MathVision",
    split="testmini",
    folders=None,
    columns=frozenset("id question options decoded_image answer subject".split()),
    optional=frozenset(("image", "solution", "level")),
    max_tokens={"prism": 24576, "upstream": 16384},
    read=_read,
)
