"""Recognise mathematical expressions, and convert them to LaTeX for math-verify."""

import re

from prism_jax.rewards import units

_FUNCTION = {
    "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "abs", "arcsin",
    "arccos", "arctan", "sinh", "cosh", "tanh", "det", "max", "min", "lim", "mod", "gcd", "lcm",
}  # fmt: skip
_NAMES = "|".join(sorted(_FUNCTION - {"sqrt", "abs", "mod", "lcm"}, key=len, reverse=True))
# `H2O` is not a product, and an index after a number is its base.
_INDEX = re.compile(r"[A-Za-z]\d|\d_")
_NO_INDEX = re.compile(rf"\\[A-Za-z]+|(?i:{_NAMES}|sqrt)(?=\d)|(?<=\d)[eE](?=[-+]?\d)")
_SHORT_WORDS = {
    "no", "on", "is", "in", "of", "to", "at", "or", "an", "as", "if", "do", "go", "he", "it", "me",
    "my", "so", "up", "us", "we", "am", "be", "by",
}  # fmt: skip
_OPERATOR = re.compile(r"[\d+\-*/^\\|!<>=]|\b(?:sin|cos|tan|log|ln|exp|sqrt)\b")
_SEGMENT = re.compile(r"(?<![A-Za-z\\])([A-Z])([A-Z])(?![A-Za-z])")
_TRIGONOMETRY = re.compile(r"sin|cos|tan|cot|sec|csc")
# The order of letters in the name of an angle or a triangle counts; in a product it does not.
_GEOMETRY = re.compile(r"\\(?:angle|triangle) ?[A-Z]{2}|\\(?:perp|parallel|cong|sim)(?![A-Za-z])")
_RANGE_OR_DATE = re.compile(r"\d+\s*-\s*\d+(?:\s*-\s*\d+)?")
# math-verify drops primes, and the letter above an I, which it reads as the imaginary unit.
_PRIMES = re.compile(r"[A-Za-z\d)}°]?'+")
_LETTER_ABOVE = re.compile(r"I ?\^ ?\{?[A-Za-z]")
RELATION = re.compile(r"\\(?:le|ge|ne|approx|in|notin|subset)(?![A-Za-z])|[<>]")


def comparable(answer: str, truth: str) -> tuple[str, str] | None:
    """Return both texts as LaTeX for a comparison, None if they cannot be equal."""
    if not is_expression(answer) or not is_expression(truth):
        return None
    if not _TRIGONOMETRY.search(answer + truth) and ("°" in answer) != ("°" in truth):
        answer, truth = answer.replace("°", ""), truth.replace("°", "")
    (given, given_unit), (wanted, wanted_unit) = map(split_unit, (answer, truth))
    if given_unit and wanted_unit and units.parse(given_unit) != units.parse(wanted_unit):
        return None
    if min(len(_SEGMENT.findall(text)) for text in (given, wanted)) > 1:
        # Two lengths, not four letters: AB * CD is not AC * BD.
        given, wanted = (_SEGMENT.sub(r"{\1_{\2}}", text) for text in (given, wanted))
    letters = [set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", t))) for t in (given, wanted)]
    if any(letter.swapcase() in letters[0] | letters[1] for letter in letters[0] ^ letters[1]):
        return None  # math-verify ignores case
    if sorted(_PRIMES.findall(given)) != sorted(_PRIMES.findall(wanted)):
        return None
    related = [bool(RELATION.search(text)) for text in (given, wanted)]
    intervals = any(re.search(r"\\infty|\\cup|^[\[(].*,", text) for text in (given, wanted))
    if related[0] != related[1] and not intervals:
        return None
    return latex(given), latex(wanted)


def has_prose(text: str) -> bool:
    """Return whether an expression contains words that are neither functions nor LaTeX."""
    words = re.findall(r"(?<!\\)\b[A-Za-z]{3,}\b", text)
    return any(word.lower() not in _FUNCTION for word in words)


def split_unit(text: str) -> tuple[str, str]:
    """Cut a known unit from the end of an expression: `5\\sqrt{2} cm`."""
    for num_words in (3, 2, 1):
        body, *tail = text.rsplit(" ", num_words)
        unit = " ".join(tail)
        is_unit = units.is_known(unit) or units.is_generic(unit)
        if len(tail) == num_words and len(unit) > 1 and is_unit:
            return body.strip(), unit
    for sign in ("°", "%"):
        if text.endswith(sign) and not _TRIGONOMETRY.search(text):
            return text[:-1].strip(), sign
    return text, ""


def is_expression(text: str) -> bool:
    """Return whether a text is only mathematics, without prose, time, date or name."""
    if not _OPERATOR.search(text) or _RANGE_OR_DATE.fullmatch(text):
        return False
    if ":" in text or text.count("|") % 2:
        return False
    if re.search(r"\d[eE][-+]?\d{4}", text) or _GEOMETRY.search(text):
        return False
    if _LETTER_ABOVE.search(text):
        return False  # a genotype
    body, _ = split_unit(text)
    if "%" in body:
        return False
    if _INDEX.search(_NO_INDEX.sub(" ", body)):
        return False
    body = re.sub(r"\\(?:begin|end)\{[a-z]+\}|\\[A-Za-z]+", " ", body)
    for word in re.findall(r"[A-Za-z]{2,}", body):
        if word.lower() in _FUNCTION:
            continue
        if len(word) > 3 or word.lower() in _SHORT_WORDS:
            return False
    return True


def latex(text: str) -> str:
    """Write plain mathematics (`sqrt(8)`, `x**2`, `√8`, `2*pi`) as LaTeX."""
    text = text.replace("**", "^")
    # `1/3 x`: a third of x, as the blank says; math-verify reads 1/(3x).
    text = re.sub(r"(?<![\w./^}])(\d+)/(\d+) (?=\\?[A-Za-z(])", r"\\frac{\1}{\2} ", text)
    text = re.sub(r"(?:\\?\bsqrt|√)\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", text)
    text = (
        re.sub(r"∛\s*(\d+)", r"\\sqrt[3]{\1}", text).replace("μ", "\\mu ").replace("Ω", "\\Omega ")
    )
    text = re.sub(r"(?<!\d)(\d+(?:\.\d+)?)\s*°", r"\\frac{\1\\pi}{180}", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\^\s*(-\d+|\d{2,})", r"^{\1}", text)
    text = re.sub(r"\\(le|ge|ne)(?=[\s\d])", r"\\\1 ", text)
    text = re.sub(r"_(\d{2,})", r"_{\1}", text)
    text = re.sub(rf"(?<![\\A-Za-z])({_NAMES})(?![A-Za-z])", r"\\\1 ", text)
    return text.replace("*", "\\cdot ")
