"""We-Math testmini: 525 problems of two or three steps, and each step as a question: 1740.

Source: PRISM scripts/eval/tasks/wemath/reasoning/utils.py: with its system turn.
"""

import collections
from collections.abc import Mapping, Sequence

from prism_jax.data import records
from prism_jax.data.benchmarks import layout
from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.rewards.benchmarks import groups

_SYSTEM = (
    "You are a helpful assistant. When the user asks a question, your response must include two "
    "parts: first, the reasoning process enclosed in <think>...</think> tags, then the final "
    "answer enclosed in <answer>...</answer> tags.Please provide a clear, concise response within "
    "<answer> </answer> tags that directly addresses the question."
)
_STEPS = (*groups.wemath_keys("2steps_1"), *groups.wemath_keys("3steps_1"))
_LETTERS = tuple("ABCDEFGH")


def _read(row: layout.Row, protocol: facts_lib.Protocol, place: records.Place) -> layout.Question:
    del protocol, place
    question = f"{layout.text(row, 'question')}\n{layout.text(row, 'option')}"
    key = layout.one_of(row, "key", _STEPS)
    picture = layout.image(row, "image_path")
    problem = layout.text(row, "ID")
    return layout.Question(
        id=f"{problem}-{key}",
        user=layout.shown([picture], question.strip()),
        images=(picture,),
        kind=key,
        answer=layout.one_of(row, "answer", _LETTERS),
        judged_question=question,
        group={"problem": problem, "key": key},
        system=_SYSTEM,
    )


def _problem(question_groups: Sequence[Mapping[str, str]]) -> str | None:
    """Return the first problem that lacks a step."""
    problems: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for group in question_groups:
        problems[groups.wemath_problem(group)].append(group["key"])
    for (name, _), keys in problems.items():
        wanted = groups.wemath_keys(keys[0])
        if sorted(keys) != sorted(wanted):
            return f"problem {name} must have {', '.join(wanted)}, got {', '.join(sorted(keys))}"
    return None


LAYOUT = layout.Layout(
    name="wemath",
    published="We-Math/We-Math",
    split="testmini",
    folders=None,
    columns=frozenset("ID key question option answer image_path".split()),
    optional=frozenset(
        (
            "split",
            "knowledge concept",
            "question number",
            "knowledge concept description",
        )
    ),
    max_tokens={"prism": 49152, "upstream": 49152},
    read=_read,
    problem=_problem,
)
