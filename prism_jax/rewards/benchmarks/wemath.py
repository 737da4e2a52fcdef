"""We-Math: the letter of an option, for each step of a problem and for the problem itself.

Source: PRISM scripts/eval/tasks/wemath/reasoning/utils.py;
lmms_eval/tasks/_task_utils/reasoning_utils.py `extract_anwser_tag`, `relax_exact_match`.
"""

import re

from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.rewards.benchmarks import letters, reading

_BRACES = re.compile(r"\\boxed\{|[{}]")
_LAST_NUMBER = re.compile(r"\b(\d+(?:\.\d+)?)$")


def read(facts: facts_lib.Facts, response: str) -> reading.Reading:
    """Read a response: the tag, else the last box, else a number at the end of a line."""
    text = _extracted(response.strip()).strip().removesuffix(".").strip()
    letter = letters.relaxed(text)
    return reading.Reading(
        answer=letter or text,
        is_right=letter != "" and letter == letters.relaxed(facts.answer),
        how="exact" if letter else "none",
    )


def _extracted(text: str) -> str:
    tag = reading.tagged(text)
    if tag is not None:
        return tag
    box = last_box(text)
    if box:
        return box
    lines = (line.rstrip().removesuffix(".").rstrip() for line in reversed(text.split("\n")))
    numbers = map(_LAST_NUMBER.search, lines)
    return next((number.group(1) for number in numbers if number is not None), "")


def last_box(text: str) -> str:
    r"""Return the content of the last `\boxed{…}` that is closed, "" without one."""
    last, content = -1, ""
    openings: list[int] = []  # where the content of each open brace begins; -1: not a box
    for brace in _BRACES.finditer(text):
        if brace[0] != "}":
            openings.append(brace.end() if brace[0] != "{" else -1)
        elif openings:
            begin = openings.pop()
            if begin > last:
                last, content = begin, text[begin : brace.start()]
    return content
