"""Compare equations, named values and chains: `x = 4`, `2 + 2 = 4`, `10/3 ≈ 3.33`.

A named value equals its value, unless the other side names something else. In a chain joined by
`=`, all sides must be right, so that `5 = 4` is never 4. A chain with `≈` is right if a side
between two `≈` is right and each of the others is a rounding of its neighbour: `10/3 ≈ 3.33` equals
10/3 and 3.33, `4 ≈ 5` equals neither.
"""

import itertools
import re
from typing import Protocol

from prism_jax.rewards import expressions, quantities

# The alternatives start with different characters, so that a mismatch costs no backtracking.
_NAME = re.compile(
    r"\\frac ?\{d[a-zA-Z]?\} ?\{d[a-z]\}"
    r"|(?:\\?[A-Za-zα-ω∠△°' |]|_\d*|\{\w+\}|\([A-Za-z\d, ]+\)|\\(?:angle|triangle) ?\d)+"
)
_VALUE = re.compile(
    r"(?!\\frac ?\{d).*(?:\\(?:sqrt|frac|pi|infty)(?![A-Za-z])|(?<![A-Za-z])sqrt ?\()"
)
_JOINT = re.compile(r"(?<![<>!\\])=|\\approx(?![A-Za-z])")
_APPROXIMATELY = re.compile(r"\\approx(?![A-Za-z])")
_EQUALS = re.compile(r"(?<![<>!\\])=")
# Alone it may be a span; beside an equals sign it is a difference.
_DIFFERENCE = re.compile(r"(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)")
# The length of a segment.
_LENGTH = re.compile(r"^\| ?([A-Z]{2}) ?\|$")
_MEASURED = re.compile(r"(?:m ?)?\\angle [A-Z]{3}(?= ?=)|\|?[A-Z]{2}\|?(?= ?=)")
_FIGURE = re.compile(r"[A-Z]{2,3}|\\angle ?(?:\d|[A-Z]{1,3})")
_MAX_SIDES = 8


class Comparison(Protocol):
    """The comparison of sides."""

    def same(self, answer: str, truth: str, depth: int) -> bool:
        """Compare two texts that are shorter than the equation."""

    def same_expression(self, answer: str, truth: str) -> bool:
        """Compare two expressions with math-verify."""

    def mathematics(self, method: str, answer: str, truth: str) -> bool:
        """Call math-verify."""


def is_equation(text: str) -> bool:
    """Return whether a text has two sides."""
    return bool(_JOINT.search(text))


def name_and_value(text: str) -> tuple[str, str]:
    """Split `x = 4` into name and value; ("", text) if the left side is not a name."""
    joints = list(_JOINT.finditer(text))
    if not joints:
        return "", text
    left, right = text[: joints[0].start()].strip(), text[joints[0].end() :].strip()
    if len(joints) == 1 and not _NAME.fullmatch(left) and _NAME.fullmatch(right):
        left, right = right, left
    if not left or not right or not _NAME.fullmatch(left) or _VALUE.match(left):
        return "", text
    left = _LENGTH.sub(r"\1", left)
    name = re.sub(r"\\angle|\\triangle|\\overline|\\|[∠_{}\s]|\bm(?=\\angle)", "", left)
    # Variables differ by case, words do not.
    return name if len(name) < 3 else name.lower(), right


def same(answer: str, truth: str, comparison: Comparison, depth: int) -> bool:
    """Compare two texts, at least one of which is an equation."""
    (given_name, given), (wanted_name, wanted) = map(name_and_value, (answer, truth))
    if _FIGURE.fullmatch(given) or _FIGURE.fullmatch(wanted):
        # `AB = CD` is a statement, not a value.
        sides = [[_figure(name), _figure(value)] for name, value in
                 ((given_name, given), (wanted_name, wanted))]  # fmt: skip
        return sorted(sides[0]) == sorted(sides[1])
    if given_name and wanted_name and given_name != wanted_name:
        if not _is_same_measure(answer, truth, given, wanted):
            return False
        given_name = wanted_name
    if not (_APPROXIMATELY.search(given) or _APPROXIMATELY.search(wanted)):
        has_sides = [bool(_EQUALS.search(text)) for text in (given, wanted)]
        is_named = bool(given_name), bool(wanted_name)
        for index, side in enumerate((given, wanted)):
            if has_sides[index] and is_named[1 - index] and re.search("[A-Za-z]", side):
                return comparison.same_expression(answer, truth)
        if all(has_sides):
            return comparison.same_expression(given, wanted)
    if not wanted_name and expressions.RELATION.search(_APPROXIMATELY.sub("", wanted)):
        return False
    givens, wanteds = _sides(_APPROXIMATELY, given), _sides(_APPROXIMATELY, wanted)
    if not givens or not wanteds or max(len(givens), len(wanteds)) > _MAX_SIDES:
        return False
    unchanged = len(givens) == len(wanteds) == 1 and (given, wanted) == (answer, truth)
    if unchanged and not (_EQUALS.search(given) or _EQUALS.search(wanted)):
        return False
    if not any(_same_exact(g, w, comparison, depth) for g in givens for w in wanteds):
        return False
    return all(
        _is_rounding(one, other, comparison, depth) for one, other in itertools.pairwise(givens)
    )


def _is_same_measure(answer: str, truth: str, given: str, wanted: str) -> bool:
    """Return whether two names are of one segment or one angle: `AB = 5` and `BA = 5`.

    Only beside numbers: `AB` and `BA` may be products of matrices.
    """
    if quantities.parse(given) is None or quantities.parse(wanted) is None:
        return False
    names = [_MEASURED.match(text) for text in (answer, truth)]
    if not all(names):
        return False
    kinds = ["angle" in name.group() for name in names]
    letters = [re.findall("[A-Z]", name.group()) for name in names]
    return kinds[0] == kinds[1] and letters[0] == letters[1][::-1]


def _figure(text: str) -> str:
    """Return a figure's name; the ends of a segment have no order."""
    name = re.sub(r"\\angle|\s", "", text).upper()
    return "".join(sorted(name)) if re.fullmatch("[A-Z]{2}", name) else name


def _sides(joint: re.Pattern, text: str) -> list[str]:
    """Return the sides of a chain, or none if a side is empty."""
    sides = [side.strip() for side in joint.split(text)]
    if len(sides) > 1:
        sides = [_DIFFERENCE.sub(r"\1 + (-\2)", side) for side in sides]
    return sides if all(sides) else []


def _same_exact(given: str, wanted: str, comparison: Comparison, depth: int) -> bool:
    """Compare chains joined by `=` alone: each side with each side."""
    givens, wanteds = _sides(_EQUALS, given), _sides(_EQUALS, wanted)
    if not givens or not wanteds or len(givens) * len(wanteds) > _MAX_SIDES:
        return False
    return all(comparison.same(g, w, depth + 1) for g in givens for w in wanteds)


def _is_rounding(left: str, right: str, comparison: Comparison, depth: int) -> bool:
    """Return whether one of two neighbours is a rounding of the other."""
    lefts, rights = _sides(_EQUALS, left), _sides(_EQUALS, right)
    if not lefts or not rights or max(len(lefts), len(rights)) > _MAX_SIDES:
        return False
    for chain in (lefts, rights):
        if not all(comparison.same(a, b, depth + 1) for a, b in itertools.pairwise(chain)):
            return False
    exact, rounded = lefts[-1], rights[0]
    values = quantities.parse(exact), quantities.parse(rounded)
    if values[1] is None or values[1].is_fraction:
        # `3.33 ≈ 10/3`: the rounded side comes first, and has decimals.
        if "." not in exact:
            return False
        exact, rounded, values = rounded, exact, values[::-1]
    if all(values):
        return quantities.is_rounding(*values, rounded)
    if values[1] is None or not expressions.is_expression(exact):
        return False
    body, _ = expressions.split_unit(exact)
    value, half = values[1].value, quantities.half_digit(rounded)
    if 3 * half > abs(value):
        return False
    bounds = " ".join(f"{bound.numerator}/{bound.denominator}" for bound in (value, half))
    return comparison.mathematics("rounding", expressions.latex(body), bounds)
