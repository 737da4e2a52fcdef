"""The questions to a model that judges answers, and its replies.

The wording is ours; lmms-eval's can be given in a file. A model sees texts alone, never a picture.
"""

import re
import string
from collections.abc import Mapping

from prism_jax import errors
from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.rewards.benchmarks import rules

_FIELDS = frozenset(("question", "answer", "response"))
PROMPTS: Mapping[rules.Question, str] = {
    "right": """\
Decide whether a response to a question is right. Only its final answer counts, not its reasoning.

Question:
{question}

Right answer:
{answer}

Response:
{response}

The final answer is right if it means the same as the right answer: another notation, another
spelling, the letter of an option in the place of its text, or a number rounded reasonably. It is
wrong if it is incomplete, says anything besides that is false, or lacks a unit that was asked for.

Reply with a single digit: 1 if it is right, 0 if it is wrong.""",
    "clear": """\
Compare a response to a yes-or-no question with the reference answer.

Question:
{question}

Reference answer:
{answer}

Response:
{response}

Reply with a single word: correct if the response agrees with the reference answer, incorrect if it
contradicts it, unclear if it says neither.""",
    "extract": """\
Copy the final answer out of a response, in the form that the question asks for: a whole number, a
number with the decimal places asked for, a Python list, or the letter of an option.

Question:
{question}

Response:
{response}

Reply with the answer alone, or with an empty line if the response gives none.""",
}


def check(template: str, *, place: str) -> None:
    """Raise InputError unless a template names the response, and no field that does not exist."""
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise errors.InputError(f"{place}: not a template: {error}") from error
    unknown = sorted(names - _FIELDS)
    if unknown:
        raise errors.InputError(
            f"{place}: fields must be {', '.join(sorted(_FIELDS))}, got {{{unknown[0]}}}"
        )
    if "response" not in names:
        raise errors.InputError(f"{place}: must hold {{response}}")


def prompt(template: str, facts: facts_lib.Facts, response: str) -> str:
    """Return the text of a question about a response."""
    return template.format(question=facts.question, answer=_shown(facts), response=response.strip())


def _shown(facts: facts_lib.Facts) -> str:
    """Return the answer as a model reads it: HallusionBench has one in words."""
    return facts.group.get("answer_in_words") or facts.answer


def is_one(reply: str) -> bool:
    """Return whether a reply to "right" says yes: it holds a 1 as a word by itself."""
    return re.search(r"(?<![\d.])1(?![\d.]*\d)", reply) is not None


def clarity(reply: str) -> str:
    """Return correct, incorrect or unclear, as a reply to "clear" says."""
    low = reply.lower()
    if "incorrect" in low:
        return "incorrect"
    return "correct" if "correct" in low else "unclear"
