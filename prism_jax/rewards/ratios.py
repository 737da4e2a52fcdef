"""Compare ratios: `2:3`, `2 to 3`, `1 : \\sqrt{2}`; None where no text is a ratio.

A fraction above 1 is another spelling of a ratio: `5/3` for `5:3`. One below 1 may be a share of
the whole, of which `1:4` has five parts, and `10:30` may be a time of day.
"""

import re
from collections.abc import Callable
from fractions import Fraction

from prism_jax.rewards import expressions, quantities, times

_NUMBER = r"\d+(?:\.\d+)?"
_RATIO = re.compile(rf"{_NUMBER}(?:\s*:\s*{_NUMBER})+|{_NUMBER} to {_NUMBER}")
_FRACTION = re.compile(r"(\d+) ?/ ?(\d+)|\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}")
_MOST_TERMS = 3

Same = Callable[[str, str], bool]


def same(answer: str, truth: str, compare: Same) -> bool | None:
    """Compare two texts, of which at least one is a ratio; `compare` compares terms."""
    if is_ratio(answer) or is_ratio(truth):
        given, wanted = _values(answer), _values(truth)
        if given is None or wanted is None:
            return _same_fraction(answer, truth)
        return len(given) == len(wanted) and _are_proportional(given, wanted)
    terms = [[term.strip() for term in text.split(":")] for text in (answer, truth)]
    if not 2 <= len(terms[1]) <= _MOST_TERMS or not _are_expressions(terms[1]):
        return None
    if len(terms[0]) != len(terms[1]) or not _are_expressions(terms[0]):
        return None
    return all(compare(one, other) for one, other in zip(*terms, strict=True))


def is_ratio(text: str) -> bool:
    """Return whether a text is a ratio of numbers."""
    return bool(_RATIO.fullmatch(text))


def _values(text: str) -> list[Fraction] | None:
    """Return the terms of a ratio of numbers."""
    if not is_ratio(text):
        return None
    return [quantities.parse(term.strip()).value for term in re.split(":| to ", text)]


def _are_proportional(given: list[Fraction], wanted: list[Fraction]) -> bool:
    place = next((n for n, term in enumerate(wanted) if term), None)
    # Zeros alone are proportional to every ratio.
    if place is None or not given[place]:
        return given == wanted
    return all(
        given[place] * other == wanted[place] * one
        for one, other in zip(given, wanted, strict=True)
    )


def _are_expressions(terms: list[str]) -> bool:
    return all(expressions.is_expression(term) for term in terms)


def _same_fraction(answer: str, truth: str) -> bool:
    """Compare a fraction with a ratio of two numbers that can be no time of day."""
    ratio, fraction = (truth, answer) if _values(truth) else (answer, truth)
    match, terms = _FRACTION.fullmatch(fraction), _values(ratio)
    if match is None or ":" not in ratio or len(terms) != 2 or times.is_time(ratio):
        return False
    top, bottom = (int(digits) for digits in match.groups() if digits)
    return top > bottom > 0 and _are_proportional(terms, [Fraction(top), Fraction(bottom)])
