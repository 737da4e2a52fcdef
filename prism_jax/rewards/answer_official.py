"""Judge an answer as the released code does, bug for bug, so that its runs can be reproduced.

Known faults, reproduced on purpose: commas between digits vanish before the comparison, so `(1,23)`
equals `(12,3)`; so do the characters `.` and `:`, so `x=1.5` equals `x=15` and `10:30` equals
`1030`; units are dropped, so `5 kg` equals `5 lb`; a thousands comma splits a number in two, so
`1,234` is not `1234`. `answer.py` is the judge to train with.

Source: PRISM verl/verl/utils/reward_score/mm_gad_no_llm.py:26-352 (rules) and
math_verify_with_format.py:66-113 (the two other data sources).
"""

import re
from collections.abc import Sequence
from typing import Protocol


class Mathematics(Protocol):
    """The expensive part, called with a method name of `symbolic`, the answer and the truth."""

    def __call__(self, method: str, answer: str, truth: str) -> bool: ...


# The mark of an empty list of equivalent answers in the released files.
NO_EQUIVALENT = "__EMPTY__"
_UNITS = (
    "°|°C|°F|%|meters?|cm|mm|km|inches?|ft|feet|kg|mg|lb|lbs|pounds?|"
    "seconds?|sec|minutes?|min|hours?|hr|days?|years?|"
    "plates?|pieces?|items?|people|persons?|students?|times?|"
    "dm|ml|mL|liters?|litres?|cm[²³]|m[²³]|"
    "元|米|厘米|千克|克|度|个|条|张|块|人|次"
)
_TRAILING_UNIT = re.compile(rf"(?<=\d)\s*({_UNITS})\s*$", re.IGNORECASE)
_CHOICE_TRUTH = re.compile(
    r"^(?:\(([A-Ha-h])\)\s+.+|([A-Ha-h])\.\s+(?=[(\[{0-9+\-]).+)$", re.DOTALL
)
_ONE_LETTER = re.compile(r"^\s*[\(\[\{]?\s*([A-Ha-h])\s*[\)\]\}]?\s*[.:]?\s*$")
# In decreasing order of trust; the first match of a pattern in the text wins.
_LETTER_IN_TEXT = (
    re.compile(
        r"\b(?:the\s+)?(?:correct\s+)?(?:final\s+)?(?:answer|option|choice)\s*(?:is|:)\s*"
        r"[\(\[\{]?\s*([A-Ha-h])\s*[\)\]\}]?(?=$|[\s,;:.!?])",
        re.IGNORECASE,
    ),
    re.compile(r"(?:^|[\s,;:])\(([A-Ha-h])\)(?=$|[\s,;:.!?])"),
    re.compile(r"(?:^|[\s,;:])([A-Ha-h])[.)](?=$|[\s,;:.!?])"),
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_PUNCTUATION = re.compile(r"[，。！？、；：“”‘’（）\[\]【】{}\",;:!?'().]")
_NUMBERED_ITEM = re.compile(r"\(\d+\)\s*")
_PAIR = re.compile(r"\(?\s*[-+]?\d+(?:\.\d+)?\s*,\s*[-+]?\d+(?:\.\d+)?\s*\)?")
_DECIMAL = re.compile(r"[-+]?\d+(?:\.\d+)?")


def is_correct(answer: str, truth: str, mathematics: Mathematics) -> bool:
    """Judge by the released rules (data source `mm_gad`)."""
    truths, answers = _parts(truth), _parts(answer)
    if len(truths) == len(answers):
        return all(
            _one_is_correct(_simplify(a), _simplify(t), mathematics)
            for a, t in zip(answers, truths, strict=True)
        )
    return False


def is_correct_by_extraction(
    answer: str, truth: str, equivalent_answers: Sequence[str], mathematics: Mathematics
) -> bool:
    """Judge by math-verify's extraction alone (data sources `math-77k`, `visual_logic-26k`).

    `NO_EQUIVALENT` anywhere in the list voids the whole list.
    """
    accepted = [truth]
    if NO_EQUIVALENT not in equivalent_answers:
        accepted.extend(equivalent_answers)
    return any(
        mathematics("official_extraction", answer, accepted_answer) for accepted_answer in accepted
    )


def _one_is_correct(answer: str, truth: str, mathematics: Mathematics) -> bool:
    answer_pairs, truth_pairs = _pairs(answer), _pairs(truth)
    if answer_pairs and truth_pairs:
        return len(answer_pairs) == len(truth_pairs) and all(
            abs(a - t) <= 1e-6
            for one, other in zip(answer_pairs, truth_pairs, strict=True)
            for a, t in zip(one, other, strict=True)
        )
    return _matches(answer, truth) or _matches_mathematically(answer, truth, mathematics)


def _matches(answer: str, truth: str) -> bool:
    letter = _truth_letter(truth.strip())
    if letter:
        return _answer_letter(answer.strip()) == letter
    if answer.strip() == truth.strip():
        return True
    answer_number, truth_number = _number(answer), _number(truth)
    if answer_number is not None and truth_number is not None:
        if truth_number == 0:
            return answer_number == 0
        return abs(answer_number - truth_number) / abs(truth_number) < 1e-6
    if _letters_of(answer) == _letters_of(truth):
        return True
    bare_answer, bare_truth = _without_unit(answer), _without_unit(truth)
    return bool(
        bare_answer
        and bare_truth
        and _letters_of(bare_answer) == _letters_of(bare_truth)
        and _unit(answer) == _unit(truth)
    )


def _matches_mathematically(answer: str, truth: str, mathematics: Mathematics) -> bool:
    if len(_parts(answer)) > 1 or len(_parts(truth)) > 1:
        return False
    return any(
        mathematics("official_expression", one, other)
        for other in _spellings(truth)
        for one in _spellings(answer)
    )


def _truth_letter(truth: str) -> str:
    if truth in tuple("ABCDEFGH"):
        return truth
    match = _CHOICE_TRUTH.match(truth)
    return (match.group(1) or match.group(2)).upper() if match else ""


def _answer_letter(answer: str) -> str:
    match = _ONE_LETTER.match(answer)
    if match:
        return match.group(1).upper()
    for pattern in _LETTER_IN_TEXT:
        match = pattern.search(answer)
        if match:
            return match.group(1).upper()
    return ""


def _without_delimiters(text: str) -> str:
    text = text.strip()
    for left, right in _DELIMITERS:
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
            text = text[len(left) : -len(right)].strip()
    return text


def _plain_latex(text: str) -> str:
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\\text\s*\{([^}]*)\}", r"\1", text)
    text = re.sub(r"\\mathrm\s*\{([^}]*)\}", r"\1", text)
    text = re.sub(r"\\left\s*", "", text)
    text = re.sub(r"\\right\s*", "", text)
    text = re.sub(r"\{\s*", "{", text)
    text = re.sub(r"\s*\}", "}", text)
    return re.sub(r"\s+", " ", text).strip()


def _spellings(text: str) -> list[str]:
    bare = _without_delimiters(text)
    return list(dict.fromkeys((text, bare, _plain_latex(bare))))


def _simplify(text: str) -> str:
    text = _plain_latex(_without_delimiters(text))
    text = re.sub(r"(\d),(\d)", r"\1\2", text).replace("，", "")
    return text.removesuffix(".").strip()


def _without_unit(text: str) -> str:
    return _TRAILING_UNIT.sub("", text).strip()


def _unit(text: str) -> str:
    match = _TRAILING_UNIT.search(text.strip())
    return match.group(1).lower() if match else ""


def _letters_of(text: str) -> str:
    text = re.sub(r"\*{1,2}(.+?)\*{1,2}", r"\1", text.lower().strip())
    return re.sub(r"\s+", " ", _PUNCTUATION.sub("", text)).strip()


def _number(text: str) -> float | None:
    text = re.sub(r"(\d),(\d)", r"\1\2", text.strip()).replace("，", "")
    try:
        return float(_without_unit(text))
    except ValueError:
        return None


def _pairs(text: str) -> list[tuple[float, float]]:
    numbers = [_DECIMAL.findall(pair) for pair in _PAIR.findall(text)]
    return [(float(values[0]), float(values[1])) for values in numbers if len(values) == 2]


def _parts(text: str) -> list[str]:
    """Split an answer of several values: numbered items, semicolons, else top-level commas."""
    text = text.strip()
    marks = list(_NUMBERED_ITEM.finditer(text))
    if len(marks) >= 2 and marks[0].start() <= 2:
        stops = [mark.start() for mark in marks[1:]] + [len(text)]
        items = [
            text[mark.end() : stop].strip().rstrip(",;，；")
            for mark, stop in zip(marks, stops, strict=True)
        ]
        items = [item for item in items if item]
        if len(items) >= 2:
            return items
    items = [item for item in (part.strip() for part in re.split(r"[;；]", text)) if item]
    if len(items) >= 2:
        return items
    items = _split_at_top_level_commas(text)
    return items if len(items) >= 2 else [text]


def _split_at_top_level_commas(text: str) -> list[str]:
    items, depth, current = [], 0, []
    for character in text:
        if character in "({[":
            depth += 1
        elif character in ")}]":
            depth = max(0, depth - 1)
        if character == "," and depth == 0:
            items.append("".join(current).strip())
            current = []
        else:
            current.append(character)
    items.append("".join(current).strip())
    return [item for item in items if item]
