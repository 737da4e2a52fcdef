r"""MathVision: the letter or the text of an option, or a value to two decimal places.

Source: PRISM scripts/eval/tasks/mathvision/utils.py `mathvision_process_results`, eval_utils.py
`find_math_answer`, `is_equal`.
"""

import re
from collections.abc import Iterator

from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.rewards.benchmarks import letters, reading

# Longer texts are not compared as values.
_LONGEST_CHARS = 400
_LETTERS = "ABCDE"
_FLAGS = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
_BOX = re.compile(r"oxed\{(.*)\}", re.DOTALL)
# In this order; each is removed or replaced wherever it stands.
_CLEANED = (
    (" ", ""),
    ("\\,", ""),
    ("∞", "\\infty"),
    ("+\\infty", "\\infty"),
    ("\\\\", "\\"),
    *((name, "") for name in ("\n", "\\text", "\\mbox")),
    ("bmatrix", "pmatrix"),
    *((name, "") for name in ("\\left", "\\right", "^{\\circ}", "^\\circ", "{m}^3", "m^3")),
    *((name, "") for name in ("{units}", "units", "{km}", "km")),
)
_STRIPPED = (
    *((name, "") for name in ("\n", "\\!")),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    *((name, "") for name in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "$")),
)


def read(facts: facts_lib.Facts, response: str) -> reading.Reading:
    """Read a response; whether two values are equal is left open."""
    text = response.strip()
    if facts.protocol == "prism":
        text = reading.tagged_or_all(text)
    answer = _normal(_stated(text))
    for letter in _LETTERS.lower():
        answer = answer.replace(f"({letter})", letter)
    for letter in _LETTERS.lower():
        answer = answer.replace(f"{{{letter}}}", letter)
    answer = answer.rstrip(".").lstrip(":").strip()
    truths = tuple(truth.lower() for truth in _truths(facts) if truth.replace(" ", ""))
    if not answer:
        return reading.Reading(answer="", is_right=False, how="none")
    if any(answer == truth.strip() for truth in truths):
        return reading.Reading(answer=answer, is_right=True, how="exact")
    values = tuple(truth for truth in truths if len(truth.strip()) > 1 or truth.strip().isdigit())
    if not values or len(answer) > _LONGEST_CHARS:
        return reading.Reading(answer=answer, is_right=False, how="exact")
    return reading.Reading(answer=answer, is_right=None, how="exact", truths=values)


def _truths(facts: facts_lib.Facts) -> Iterator[str]:
    """Yield the published answer, and the text of the option that it names."""
    yield facts.answer
    if facts.choices and facts.answer in letters.ALPHABET[: len(facts.choices)]:
        yield facts.choices[letters.ALPHABET.index(facts.answer)]


def _stated(text: str) -> str:
    """Return the part of a text that states the answer."""
    for letter in _LETTERS:
        starts = (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if text.endswith((f" {letter}.", f" ({letter}).")) or text.startswith(starts):
            text = letter
    last = text.split("is ")[-1].rstrip(".")
    if _is_number(last):
        text = last
    if text.count("oxed{") > 1:
        return "\\boxed{" + text.split("oxed{")[-1]
    if "oxed{" in text:
        return text
    for flag in _FLAGS:
        for spelt in (flag, flag.replace("the", "The")):
            if spelt in text:
                text = text.split(spelt)[-1].strip().split("\n")[0].split(". ")[0]
            text = text.strip()
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _normal(text: str) -> str:
    """Return an answer without LaTeX that means nothing."""
    text = text.lower().replace("{}", "")
    boxes = _BOX.findall(text)
    text = boxes[-1] if boxes else text
    closing, opening = text.find("}"), text.find("{")
    if closing >= 0 and (opening < 0 or closing < opening):
        text = text[:closing]
    text = text.split("=")[-1].split("\\approx")[-1]
    return _strip(_replaced(text, _CLEANED))


def _replaced(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def _strip(text: str) -> str:
    text = _replaced(text, _STRIPPED).split("\\text{ ")[0]
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    for sign in ("=", "\\approx"):
        if text.count(sign) == 1:
            text = text.split(sign)[-1]
    has_root = "sqrt" in text
    if has_root:
        text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text)
    text = text.replace(" ", "")
    if has_root:
        text = _braced_fractions(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"\A(0|-?[1-9]\d*)/(0|-?[1-9]\d*)\Z", r"\\frac{\1}{\2}", text)


def _braced_fractions(text: str) -> str:
    r"""Return a text with `\frac12` as `\frac{1}{2}`; one with a fraction cut off stays."""
    first, *rest = text.split("\\frac")
    parts = [first]
    for part in rest:
        if part.startswith("{"):
            parts.append(part)
        elif len(part) < 2:
            return text
        else:
            below = "{" if part[1] == "{" else f"{{{part[1]}}}"
            parts.append(f"{{{part[0]}}}{below}{part[2:]}")
    return "\\frac".join(parts)
