"""MathVista: an option's text, a whole number, a number with a given number of decimals, or a list.

Source: PRISM scripts/eval/tasks/mathvista/mathvista_evals.py `extract_answer`,
`normalize_extracted_answer`; the number of places is a fraction in the published file, which the
released `round` refuses. MathVista's evaluation takes it as a whole number, as here.
"""

from collections.abc import Sequence

from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.rewards.benchmarks import letters, reading

# A longer text is a response with its reasoning, in which any option would be found.
_LONGEST_CHARS = 400
_QUICK = 'The answer is "'


def read(facts: facts_lib.Facts, response: str) -> reading.Reading:
    """Read a response without a model.

    The published scorers let a model extract the answer that the rules cannot read. Without one the
    text itself stands for the extraction, if it is short: a loose reading.
    """
    text = response.strip()
    if facts.protocol == "prism":
        text = reading.tagged_or_all(text)
    direct = _direct(facts, text)
    if direct is None and facts.protocol == "prism":
        direct = _quick(text)
    if direct is not None:
        return _judged(facts, direct, "exact")
    if not text or len(text) > _LONGEST_CHARS:
        return reading.Reading(answer="", is_right=False, how="none")
    return _judged(facts, text, "loose")


def extracted(facts: facts_lib.Facts, extraction: str) -> reading.Reading:
    """Read the answer that a model extracted from a response."""
    if len(extraction) > _LONGEST_CHARS:
        return reading.Reading(answer="", is_right=False, how="none")
    return _judged(facts, extraction.strip(), "exact")


def _judged(facts: facts_lib.Facts, text: str, how: reading.How) -> reading.Reading:
    answer = _normal(facts, text)
    return reading.Reading(
        answer=answer or "",
        is_right=answer is not None and answer.strip() == facts.answer.strip(),
        how=how if answer is not None else "none",
    )


def _direct(facts: facts_lib.Facts, text: str) -> str | None:
    """Return a text that is an answer as it stands, None for any other."""
    if facts.choices:
        return text if text in facts.choices else None
    try:
        if facts.answer_type == "integer":
            return str(int(text))
        if facts.answer_type == "float":
            return str(float(text))
    except ValueError:
        pass
    return None


def _normal(facts: facts_lib.Facts, text: str) -> str | None:
    """Return a text in the form of the answers, None if it has none."""
    if facts.choices:
        text = letters.of_options(text) or text.strip()
        names = _names(facts.choices)
        if text in names:
            return facts.choices[names.index(text)]
        return nearest(text, facts.choices)
    try:
        if facts.answer_type == "integer":
            return str(int(float(text)))
        if facts.answer_type == "float":
            return str(round(float(text), facts.precision or 0))
    except (ValueError, OverflowError):
        return None
    return text


def _quick(text: str) -> str | None:
    """Return the text that a line states in quotes as the answer, None without one."""
    for line in text.split("\n"):
        start = line.find(_QUICK)
        end = line.rfind('".') if start >= 0 else -1
        if end >= start + len(_QUICK):
            return line[start + len(_QUICK) : end]
    return None


def _names(choices: Sequence[str]) -> list[str]:
    return list(letters.ALPHABET[: len(choices)])


def nearest(text: str, choices: Sequence[str]) -> str:
    """Return the first choice with the smallest edit distance to a text."""
    distances = [_edits(text, choice) for choice in choices]
    return choices[distances.index(min(distances))]


def _edits(first: str, second: str) -> int:
    """Return Levenshtein's distance."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for i, character in enumerate(first, start=1):
        above_left, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            above = row[j]
            row[j] = min(above + 1, row[j - 1] + 1, above_left + (character != other))
            above_left = above
    return row[-1]
