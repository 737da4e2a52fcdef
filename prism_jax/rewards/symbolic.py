"""Compare two mathematical expressions with math-verify: unbounded cost, for workers only.

math-verify's time limits raise SIGALRM, which works in a main thread only and never interrupts
big-integer arithmetic. They are switched off here; `workers.py` kills the process instead.
"""

import logging

import latex2sympy2_extended
import math_verify
import sympy
from math_verify import parser

# math-verify warns that its time limits are off; the workers' parent keeps the deadline.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_RELATIVE_TOLERANCE = 1e-6
_LATEX = (
    # Callers compare units before, so none may be dropped here.
    parser.LatexExtractionConfig(
        normalization_config=parser.NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
        )
    ),
)
_FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
    sympy.SympifyError,
    sympy.polys.polyerrors.BasePolynomialError,
    AssertionError,
)
_TRUTH_TARGETS = (
    parser.LatexExtractionConfig(),
    parser.ExprExtractionConfig(),
    parser.StringExtractionConfig(),
)
_ANSWER_TARGETS = (
    parser.ExprExtractionConfig(),
    parser.LatexExtractionConfig(),
    parser.StringExtractionConfig(),
)


def verify(method: str, answer: str, truth: str) -> bool:
    """Compare answer and truth by the named method.

    expression: both are LaTeX expressions. rounding: the answer is an expression, and the truth is
    a value and the largest difference from it. official_expression and
    official_extraction: the two calls of the released judge. rounded: the comparison of the
    benchmark MathVision.
    """
    if method == "rounded":
        return _rounded_equal(answer, truth)
    if method in ("expression", "rounding"):
        compare = _expressions_equal if method == "expression" else _is_near
        try:
            return compare(answer, truth)
        except _FAILURES:
            # Equality was not shown, so it is not paid.
            return False
    if method == "official_expression":
        return _official_expressions_equal(answer, truth)
    if method == "official_extraction":
        return _official_extractions_equal(answer, truth)
    raise ValueError(f"symbolic.verify has no method {method!r}")


def _is_near(answer: str, bounds: str) -> bool:
    given = _parse(answer)
    value, most = map(sympy.Rational, bounds.split())
    if not given or not _is_number(given[0]):
        return False
    difference = abs(sympy.N(given[0] - value, 30))
    return bool(difference.is_finite and difference <= most)


def _parse(text: str) -> list:
    return math_verify.parse(f"${text}$", _LATEX, fallback_mode="no_fallback", parsing_timeout=None)


def _expressions_equal(answer: str, truth: str) -> bool:
    gold, given = _parse(truth), _parse(answer)
    if not gold or not given:
        return False
    if _is_number(gold[0]) and _is_number(given[0]):
        return _numbers_equal(given[0], gold[0])
    return math_verify.verify(gold, given, timeout_seconds=None)


def _is_number(value: object) -> bool:
    return isinstance(value, sympy.Expr) and bool(value.is_number)


def _numbers_equal(answer: sympy.Expr, truth: sympy.Expr) -> bool:
    """Compare relatively: math-verify rounds to six decimals, where all tiny numbers are equal."""
    gold, given = truth.evalf(30), answer.evalf(30)
    difference = abs(sympy.N(gold - given, 30))
    scale = abs(sympy.N(gold, 30))
    if not difference.is_number or not difference.is_finite or not scale.is_finite:
        return bool(gold == given)
    return bool(difference <= _RELATIVE_TOLERANCE * scale)


def _official_expressions_equal(answer: str, truth: str) -> bool:
    gold = math_verify.parse(truth, parsing_timeout=None)
    given = math_verify.parse(answer, parsing_timeout=None)
    return bool(math_verify.verify(gold, given, timeout_seconds=None))


def _official_extractions_equal(answer: str, truth: str) -> bool:
    gold = math_verify.parse(f"\\boxed{{{truth}}}", _TRUTH_TARGETS, parsing_timeout=None)
    given = math_verify.parse(f"\\boxed{{{answer}}}", _ANSWER_TARGETS, parsing_timeout=None)
    return bool(gold) and bool(math_verify.verify(gold, given, 6, timeout_seconds=None))


def _rounded_equal(answer: str, truth: str) -> bool:
    """Compare values, or tuples and lists of values, to two decimal places.

    Source: PRISM scripts/eval/tasks/mathvision/eval_utils.py `is_equal`, `eval_tuple`.
    """
    if _rounded_parts(answer) == _rounded_parts(truth):
        return True
    try:
        return _rounded(answer) == _rounded(truth)
    except Exception:  # The published scorer, too, takes any failure to read for a difference.
        return False


def _rounded_parts(text: str) -> str:
    """Return a tuple or list with its values rounded, and any other text as it is."""
    parts = text[1:-1].split(",")
    if len(parts) < 2 or (text[0], text[-1]) not in (("(", ")"), ("[", "]")):
        return text
    try:
        values = [
            part if "infty" in part or part in ("a", "-a") else str(_rounded(part))
            for part in parts
        ]
    except Exception:  # As above.
        return text
    return f"{text[0]}{','.join(values)}{text[-1]}"


def _rounded(text: str) -> float:
    value = latex2sympy2_extended.latex2sympy(text)
    if not _is_number(value):
        raise ValueError(text)
    # As texts, 6 and 6.0 differ in a tuple.
    return int(value) if value.is_Integer else round(float(value), 2)
