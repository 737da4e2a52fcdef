"""Judge whether an answer means the same as the ground truth.

The rules read a text as what it most plausibly is: an option letter, a list or tuple, a time, a
quantity with a unit, an equation, a phrase. Once both sides are read as the same kind, that kind
decides. Two mathematical expressions that no rule could read go to math-verify, which is the only
expensive step and is passed in as `mathematics`.

What counts as right, where opinions differ:
  * a missing unit is forgiven, a wrong one is not; 5 kg = 5000 g; 50 % = 0.5 = 50
  * numbers are equal to 1e-6, so 3.14 is not 3.1416 and 0.333 is not 1/3
  * a list keeps its order (3,2 is not 2,3) unless it is a set, a plus-minus or an "or"
  * an option's letter decides; its text alone is right as well where the truth gives it
  * a hedge (3 or 4 for 3; A or B for A) is wrong; a value said twice (1/2 (0.5)) is right

Texts are limited to `MAX_CHARS`, so everything but `mathematics` is bounded.
Source: PRISM verl/verl/utils/reward_score/mm_gad_no_llm.py:361 (1024 characters).
"""

import re

from prism_jax.rewards import (
    answer_official,
    choices,
    notation,
    quantities,
    structure,
    tags,
    times,
    units,
)

MAX_CHARS = 1024
# Nested tuples beyond this are no answer.
_MAX_DEPTH = 4

_YES_NO = re.compile(r"(yes|no|true|false)(?:\s*[,.;:!-]+\s*(?P<rest>.*))?", re.I | re.DOTALL)
# Each alternative starts with another character, so that a mismatch costs no backtracking.
_NAME = re.compile(r"(?:\\?[A-Za-zα-ω∠△°' |]|_\d*|\{\w+\}|\([A-Za-z\d, ]+\)|\\angle ?\d)+")
_STATEMENT = (
    r"(?:=\s*|(?:my |the )?(?:final |correct |right )?(?:answer|option|choice)"
    r"\s*(?:is\s*[:=]?|[:=])\s*"
    r"|(?:it is|it's|there (?:is|are)|this is|that is|they are|we (?:get|have)"
    r"|(?:in )?(?:the )?year|in|on|at)\s+"
    r"|(?:答案|选项|应?选)\s*[是为:]?\s*|[A-Za-z]{3,20}(?: [A-Za-z]{3,20}){0,3}:\s+)"
)
_LEAD_IN = re.compile(
    rf"(?:(?:so|thus|hence|therefore)[, ]+|故|所以){_STATEMENT}?|{_STATEMENT}", re.IGNORECASE
)
# A value said twice: `1/2 (0.5)`, `0.5 or 50%`. Both must be right.
_TWICE = re.compile(
    r"(?P<once>[^()]+?)\s*(?:\(\s*(?:or|i\.e\.,?|that is,?|=)?\s*(?P<inside>[^()]+)\)"
    r"|,?\s+or\s+(?P<behind>.+))",
    re.IGNORECASE,
)
_ROUNDED = re.compile(r"approx(?:\.|imate(?:ly)?)?|rounded|exact(?:ly)?", re.IGNORECASE)
_COPULA = re.compile(
    r"(?P<left>[^=<>,;:\d]{1,120}?)\s(?:is|are|equals|was|were)\s+(?:equal to\s+)?(?P<right>.+)",
    re.IGNORECASE | re.DOTALL,
)
_DOUBT = re.compile(
    r"\b(?:or|not|no|none|never|neither|nor|if|unless|wrong|either|could|might|may|maybe|perhaps"
    r"|except|than|cannot|without|false|incorrect)\b|n't\b",
    re.IGNORECASE,
)
_FUNCTION = {
    "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "abs", "arcsin",
    "arccos", "arctan", "sinh", "cosh", "tanh", "det", "max", "min", "lim", "mod", "gcd", "lcm",
}  # fmt: skip
_SHORT_WORDS = {
    "no", "on", "is", "in", "of", "to", "at", "or", "an", "as", "if", "do", "go", "he", "it", "me",
    "my", "so", "up", "us", "we", "am", "be", "by",
}  # fmt: skip
_OPERATOR = re.compile(r"[\d+\-*/^\\|!<>=]|\b(?:sin|cos|tan|log|ln|exp|sqrt)\b")
_POINT = re.compile(
    r"(?P<name>[A-Z]'?|[a-z](?= ?=)|\\(?:vec|overrightarrow) ?\{[A-Za-z]+\})"
    r"(?: ?=? ?(?=\([^()]*[,;][^()]*\)$)| ?= ?(?=\\?\{[^{}]*\}$))"
)
_SEGMENT = re.compile(r"(?<![A-Za-z\\])([A-Z])([A-Z])(?![A-Za-z])")
_TRIGONOMETRY = re.compile(r"sin|cos|tan|cot|sec|csc")
# The order of letters in the name of an angle or a triangle counts; in a product it does not.
_GEOMETRY = re.compile(r"\\(?:angle|triangle) ?[A-Z]{2}|\\(?:perp|parallel)(?![A-Za-z])")
_RANGE_OR_DATE = re.compile(r"\d+\s*-\s*\d+(?:\s*-\s*\d+)?")
_RELATION = re.compile(r"\\(?:le|ge|ne|approx|in|subset)(?![A-Za-z])|[<>]")


def is_correct(answer: str, truth: str, mathematics: answer_official.Mathematics) -> bool:
    """Judge one answer against one ground truth; both are shorter than `MAX_CHARS`.

    Whatever `mathematics` raises passes through: that is how the fast rules are run alone.
    """
    if any(tag in answer for tag in tags.TAGS):
        return False
    given, wanted = notation.clean(answer), notation.clean(truth)
    if not given or not wanted or max(len(given), len(wanted)) > MAX_CHARS:
        return False
    if given == wanted:
        return True
    shorter = _without_lead_in(given)
    several = choices.letters(wanted)
    if len(several) > 1 and several in (choices.letters(given), choices.letters(shorter)):
        return True
    letter, option = choices.truth(wanted)
    if letter:
        chosen = choices.letter(given) or choices.letter(shorter)
        if chosen or not option:
            return chosen == letter
        wanted = notation.clean(option)
    if _same(given, wanted, mathematics, depth=0):
        return True
    if shorter != given and _same(shorter, wanted, mathematics, depth=0):
        return True
    return _same_said_twice(shorter, wanted, mathematics)


def _without_lead_in(text: str) -> str:
    """Return what a sentence such as `The area is 12` states; the text itself without one."""
    found = _LEAD_IN.match(text)
    if found and not _DOUBT.search(found.group()):
        text = notation.clean(text[found.end() :])
    found = _COPULA.fullmatch(text)
    if found and not _DOUBT.search(found["left"]):
        text = notation.clean(found["right"])
    return text


def _same_said_twice(answer: str, truth: str, mathematics: answer_official.Mathematics) -> bool:
    said = _TWICE.fullmatch(answer)
    if said is None or not _same(said["once"], truth, mathematics, depth=0):
        return False
    again = (said["inside"] or said["behind"]).strip()
    return bool(_ROUNDED.fullmatch(again)) or _same(again, truth, mathematics, depth=0)


def _same(answer: str, truth: str, mathematics: answer_official.Mathematics, depth: int) -> bool:
    """Compare two cleaned texts."""
    if answer == truth:
        return True
    if depth > _MAX_DEPTH or not answer or not truth:
        return False
    by_yes_no = _same_yes_no(answer, truth)
    if by_yes_no is not None:
        return by_yes_no
    dates = times.date(answer), times.date(truth)
    if any(dates):
        return dates[0] == dates[1]
    if not re.search(r"\d", answer + truth) and notation.words(answer) == notation.words(truth):
        return True
    answer, truth = _without_names(answer, truth)
    by_interval = _same_interval(answer, truth, mathematics)
    if by_interval is not None:
        return by_interval
    answer, truth = _unwrapped(answer), _unwrapped(truth)
    given, wanted = structure.readings(answer), structure.readings(truth)
    if any(_same_parts(a, t, mathematics, depth) for a in given for t in wanted):
        return True
    # A text that can only be read as several values is never a single one.
    if _only_parts(answer, given) or _only_parts(truth, wanted):
        return not re.search(r"\d", truth) and notation.words(answer) == notation.words(truth)
    return _same_value(answer, truth, mathematics)


def _unwrapped(text: str) -> str:
    text = re.sub(r"^[A-Za-z]\s*\\in\b\s*(?=[(\[{\\])", "", text)
    inner, brackets = structure.unwrap(text)
    return inner if brackets in ("()", "{}", "[]") and not re.search(r"[,;]", inner) else text


def _without_names(answer: str, truth: str) -> tuple[str, str]:
    """Drop the name of a point, `A(2,3)`, unless the two differ; write `f(x) =` as `y =`."""
    texts = [re.sub(r"^f ?\(x\) ?=(?!.*=)", "y =", text) for text in (answer, truth)]
    points = [_POINT.match(text) for text in texts]
    if all(points) and points[0]["name"] != points[1]["name"]:
        return answer, truth
    given, wanted = (
        text[point.end() :] if point else text for text, point in zip(texts, points, strict=True)
    )
    return given, wanted


def _same_interval(
    answer: str, truth: str, mathematics: answer_official.Mathematics
) -> bool | None:
    """Compare where one side is an inequality and the other one as well, or an interval."""
    given, wanted = structure.interval(answer), structure.interval(truth)
    if given and wanted:
        same_name = given[0] == wanted[0]
        return same_name and _same(given[1], wanted[1], mathematics, 1)
    other = truth if given else answer
    if not (given or wanted) or other[:1] not in ("(", "[") or other[-1:] not in (")", "]"):
        return None
    return _same((given or wanted)[1], other, mathematics, 1)


def _only_parts(text: str, found: list[structure.Parts]) -> bool:
    return bool(found) and quantities.parse(text) is None


def _same_yes_no(answer: str, truth: str) -> bool | None:
    wanted = _YES_NO.fullmatch(truth)
    if wanted is None or wanted["rest"]:
        return None
    given = _YES_NO.fullmatch(answer)
    if given is None:
        # `The statement is true` is left to the lead-in rule.
        return None if _COPULA.fullmatch(answer) or _LEAD_IN.match(answer) else False
    opposite = {"yes": "no", "no": "yes", "true": "false", "false": "true"}[given.group(1).lower()]
    hedged = re.search(rf"\b{opposite}\b", given["rest"] or "", re.IGNORECASE)
    return not hedged and given.group(1).lower() == wanted.group(1).lower()


def _same_parts(
    answer: structure.Parts,
    truth: structure.Parts,
    mathematics: answer_official.Mathematics,
    depth: int,
) -> bool:
    if len(answer.items) != len(truth.items) or not _brackets_agree(answer, truth):
        return False
    is_hedge = not answer.ordered and not answer.brackets and truth.ordered
    if is_hedge and not re.search(r"\d", "".join(truth.items)):
        return False  # `cat or dog` is not `cat and dog`; of numbers both are two solutions
    named = [dict(_name_and_value(item) for item in parts.items) for parts in (answer, truth)]
    if all("" not in one and len(one) == len(truth.items) for one in named):
        return named[0].keys() == named[1].keys() and all(
            _same(value, named[1][name], mathematics, depth + 1) for name, value in named[0].items()
        )
    if (answer.ordered or truth.ordered) and "{}" not in (answer.brackets, truth.brackets):
        pairs = zip(answer.items, truth.items, strict=True)
        return all(_same(a, t, mathematics, depth + 1) for a, t in pairs)
    return _same_in_any_order(answer.items, truth.items, mathematics, depth)


def _brackets_agree(answer: structure.Parts, truth: structure.Parts) -> bool:
    """Allow missing brackets, except of alternatives and of an interval with a closed end."""
    if answer.brackets == truth.brackets:
        return True
    pair = (answer.brackets or truth.brackets) in ("()", "[]")
    if pair and any(not one.brackets and not one.ordered for one in (answer, truth)):
        return False  # `2 or 3` is not the point (2,3)
    if answer.brackets and truth.brackets:
        return False
    return (answer.brackets or truth.brackets) in ("()", "{}", "[]")


def _same_in_any_order(
    answers: tuple[str, ...],
    truths: tuple[str, ...],
    mathematics: answer_official.Mathematics,
    depth: int,
) -> bool:
    left = list(answers)
    for truth in truths:
        found = next((a for a in left if _same(a, truth, mathematics, depth + 1)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _same_value(answer: str, truth: str, mathematics: answer_official.Mathematics) -> bool:
    """Compare two texts that are not lists."""
    decided = times.same(answer, truth)
    if decided is not None:
        return decided
    given, wanted = quantities.parse(answer), quantities.parse(truth)
    if given is not None and wanted is not None:
        return quantities.equal(given, wanted)
    if re.search(r"=|\w\s*\\approx", answer) or "=" in truth:
        return _same_equation(answer, truth, mathematics)
    if notation.words(answer) == notation.words(truth):
        return True
    return _same_expression(answer, truth, mathematics)


def _name_and_value(text: str) -> tuple[str, str]:
    """Split `x = 4` into name and value; ("", text) when the left side is no name."""
    sides = [side.strip() for side in re.split(r"(?<![<>!\\])=|\\approx", text)]
    if len(sides) < 2:
        return "", text
    if len(sides) == 2 and not _NAME.fullmatch(sides[0]) and _NAME.fullmatch(sides[1]):
        sides.reverse()
    if not _NAME.fullmatch(sides[0]) or not all(sides):
        return "", text
    name = re.sub(r"\\angle|\\triangle|\\overline|\\|[∠_{}\s]|\bm(?=\\angle)", "", sides[0])
    return name.lower(), "=".join(sides[1:])


def _same_equation(answer: str, truth: str, mathematics: answer_official.Mathematics) -> bool:
    """Compare where at least one side is an equation.

    A named value (`x = 4`) is its value, unless the other side names something else. Of a chain
    (`x = 2 + 2 = 4`) every member must be right, so that `5 = 4` is never 4.
    """
    (given_name, given), (wanted_name, wanted) = map(_name_and_value, (answer, truth))
    if given_name and wanted_name and given_name != wanted_name:
        return False
    if given_name or wanted_name:
        if "=" in wanted or (wanted_name and "=" in given and re.search("[A-Za-z]", wanted)):
            return "=" in answer and _same_expression(answer, truth, mathematics)
        return all(_same(side.strip(), wanted, mathematics, 1) for side in given.split("="))
    if "=" in given and "=" in wanted:
        return _same_expression(given, wanted, mathematics)
    if "=" in wanted or _RELATION.search(wanted):
        return False
    return all(_same(side.strip(), wanted, mathematics, 1) for side in given.split("="))


def _same_expression(answer: str, truth: str, mathematics: answer_official.Mathematics) -> bool:
    if not is_expression(answer) or not is_expression(truth):
        return False
    if not _TRIGONOMETRY.search(answer + truth) and ("°" in answer) != ("°" in truth):
        answer, truth = answer.replace("°", ""), truth.replace("°", "")
    (given, given_unit), (wanted, wanted_unit) = map(_split_unit, (answer, truth))
    if given_unit and wanted_unit and units.parse(given_unit) != units.parse(wanted_unit):
        return False
    if min(len(_SEGMENT.findall(text)) for text in (given, wanted)) > 1:
        # Two lengths, not four letters: AB * CD is not AC * BD.
        given, wanted = (_SEGMENT.sub(r"{\1_{\2}}", text) for text in (given, wanted))
    if quantities.parse(wanted) is not None and _has_prose(given):
        return False  # read as a product of letters, `not 0` would be 0
    related = [bool(_RELATION.search(text)) for text in (given, wanted)]
    intervals = any(re.search(r"\\infty|\\cup|^[\[(].*,", text) for text in (given, wanted))
    if related[0] != related[1] and not intervals:
        return False
    return mathematics("expression", latex(given), latex(wanted))


def _has_prose(text: str) -> bool:
    """Say whether words that are no functions and no LaTeX stand in an expression."""
    words = re.findall(r"(?<!\\)\b[A-Za-z]{3,}\b", text)
    return any(word.lower() not in _FUNCTION for word in words)


def _split_unit(text: str) -> tuple[str, str]:
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
    """Say whether a text is mathematics and nothing else: no prose, no time, no date, no name."""
    if not _OPERATOR.search(text) or _RANGE_OR_DATE.fullmatch(text) or ":" in text:
        return False
    if re.search(r"\d[eE][-+]?\d{4}", text) or _GEOMETRY.search(text):
        return False
    body, _ = _split_unit(text)
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
    text = re.sub(r"(?:\\?\bsqrt|√)\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", text)
    text = (
        re.sub(r"∛\s*(\d+)", r"\\sqrt[3]{\1}", text).replace("μ", "\\mu ").replace("Ω", "\\Omega ")
    )
    text = re.sub(r"(\d+(?:\.\d+)?)\s*°", r"\\frac{\1\\pi}{180}", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\^\s*(-?\d{2,})", r"^{\1}", text)
    text = re.sub(r"\\(le|ge|ne)(?=[\s\d])", r"\\\1 ", text)
    names = "|".join(sorted(_FUNCTION - {"sqrt", "abs", "mod", "lcm"}, key=len, reverse=True))
    text = re.sub(rf"(?<![\\A-Za-z])({names})(?![A-Za-z])", r"\\\1 ", text)
    return text.replace("*", "\\cdot ")


def check_ground_truth(text: str) -> str | None:
    """Return why a ground truth cannot be judged against, None when it can.

    Meant for dataset builds, where a bad row is reported with its place.
    """
    if not text.strip():
        return "ground truth is empty"
    if len(text) >= MAX_CHARS:
        return f"ground truth must be shorter than {MAX_CHARS} characters, has {len(text)}"
    if any(tag in text for tag in tags.TAGS):
        return "ground truth contains a tag of the response format"
    if re.search(r"[\x00-\x08\x0e-\x1f\ufffd]", text):
        return "ground truth contains control or replacement characters"
    if not notation.clean(text):
        return "ground truth is empty without its delimiters"
    if "\\" in text and not notation.is_balanced(text):
        return "ground truth has unbalanced braces"
    return None
