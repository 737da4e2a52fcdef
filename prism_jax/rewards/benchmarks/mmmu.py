"""MMMU and MMMU-Pro: the letter of an option, or an open answer (MMMU).

Source: PRISM scripts/eval/tasks/mmmu/utils.py, mmmu_pro/utils.py; the open answers by MMMU's own
eval/eval_utils.py `parse_open_response`, `eval_open`. lmms-eval compares an open answer letter by
letter of its first reading, so that no open answer is right by rule; that is `prism` here.
"""

import ast
import re

from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.rewards.benchmarks import letters, reading

VISION = "mmmu_pro_vision"
_SIGNS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset((":", ",", ".", "!", "?", ";", "'"))
# In a longer text no numbers are looked for.
_LONGEST_CHARS = 2000
_SENTENCES = re.compile(r"\.\s(?=[A-Z])|\n")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def read(facts: facts_lib.Facts, response: str) -> reading.Reading:
    """Read a response."""
    text = reading.tagged_or_all(response) if facts.protocol == "prism" else response
    if facts.name == VISION:
        # The published scorer compares the text itself with the letter.
        return reading.Reading(answer=text, is_right=text == facts.answer, how="exact")
    if facts.choices:
        letter, how = letters.choose(text, facts.choices, seed=facts.question)
        return reading.Reading(answer=letter, is_right=letter in truths(facts), how=how)
    values = open_values(text)
    is_right = facts.protocol == "upstream" and _matches(facts, values)
    return reading.Reading(answer=", ".join(map(str, values)), is_right=is_right, how="loose")


def truths(facts: facts_lib.Facts) -> tuple[str, ...]:
    """Return the accepted answers: the published answer may be a list of them, as text."""
    if facts.answer.startswith("["):
        try:
            values = ast.literal_eval(facts.answer)
        except (ValueError, SyntaxError):
            return (facts.answer,)
        if isinstance(values, list):
            return tuple(map(str, values))
    return (facts.answer,)


def open_values(response: str) -> list[str | float]:
    """Return the texts and numbers that an open response may mean, in order."""
    keys = _keys(response)
    texts = [*keys, *(number for key in keys for number in _numbers(key))]
    return list(dict.fromkeys(value for text in texts for value in _normal(text)))


def _keys(response: str) -> list[str]:
    """Return the end of each sentence after the sign that stands last in it."""
    response = response.strip().strip(".").lower()
    sentences = _SENTENCES.split(response)
    keys = []
    for number, sentence in enumerate(sentences, start=1):
        signs = _SIGNS if number < len(sentences) else (*_SIGNS, "=")
        ends = [sentence.split(sign)[-1].strip() for sign in signs if sign in sentence]
        shortest = ""
        for end in ends:
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in _TRIVIAL:
            keys.append(shortest)
    return keys or [response]


def _numbers(text: str) -> list[str]:
    if len(text) > _LONGEST_CHARS:
        return []
    return [number for pattern in _NUMBERS for number in pattern.findall(text)]


def _normal(text: str) -> list[str | float]:
    """Return a number with two places, or the lower-case text; a single letter with a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except (ValueError, OverflowError):
        low = text.lower()
        return [f" {low}", f"{low} "] if len(low) == 1 else [low]


def _matches(facts: facts_lib.Facts, values: list[str | float]) -> bool:
    accepted = [value for truth in truths(facts) for value in _normal(truth)]
    texts = [value for value in accepted if isinstance(value, str)]
    return any(
        any(text in value for text in texts) if isinstance(value, str) else value in accepted
        for value in values
    )
