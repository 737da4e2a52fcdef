"""Read numbers in words: `two hundred fifty`, `a hundred`, `two thirds`, `minus five`."""

import re
from fractions import Fraction

_ONES = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen".split()
    )
}
_TENS = {
    word: 10 * value
    for value, word in enumerate(
        "twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2
    )
}
_TIMES = {"hundred": 100, "dozen": 12}
_GROUPS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    "half": 2,
    "halve": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
}
_NUMBER = "|".join(("an?", *_ONES))
_FRACTION = re.compile(
    rf"(?:(?P<n>{_NUMBER})[- ](?P<d>{'|'.join(_PARTS)})s?|(?P<half>half))(?![A-Za-z-])",
    re.IGNORECASE,
)
_WORD = re.compile(r"([A-Za-z]{1,9})(?:[- ]|(?![A-Za-z-]))")
_SIGN = re.compile(r"(minus|negative|positive) ", re.IGNORECASE)


def parse(text: str) -> tuple[Fraction, str] | None:
    """Return the number in words at the start of a text, and the rest of the text."""
    sign = _SIGN.match(text)
    if sign:
        unsigned = parse(text[sign.end() :]) if not _SIGN.match(text, sign.end()) else None
        return unsigned and (
            (-unsigned[0], unsigned[1]) if sign[1].lower() != "positive" else unsigned
        )
    match = _FRACTION.match(text)
    if match:
        return _fraction(match), text[match.end() :]
    whole = _whole(text)
    more = part(whole[1]) if whole else None
    return (whole[0] + more[0], more[1]) if more else whole


def part(rest: str) -> tuple[Fraction, str] | None:
    """Return the fraction that follows a whole number, ` and a half`, and the rest of the text."""
    match = _FRACTION.match(rest, 5) if rest.startswith(" and ") else None
    if match is None or _fraction(match) >= 1:
        return None
    return _fraction(match), rest[match.end() :]


def _fraction(match: re.Match) -> Fraction:
    top = 1 if match["half"] else _ONES.get(match["n"].lower(), 1)
    return Fraction(top, 2 if match["half"] else _PARTS[match["d"].lower()])


def _whole(text: str) -> tuple[Fraction, str] | None:
    """Read words as groups of at most 999 with decreasing scales (million, thousand)."""
    total = group = 0
    last_scale, before, stop = 10**15, "", 0
    for kind, value, start, end in _words(text):
        if kind == "wrong":
            return None
        if kind == "and":
            if before not in ("times", "scale"):
                break
            before = "and"
            continue
        if kind == "scale":
            if group == 0 or value >= last_scale:
                return None
            total, group, last_scale = total + group * value, 0, value
        elif not _fits(kind, before, group, is_first=start == 0):
            # `one two` and `twenty twelve` are not numbers.
            return None
        else:
            group = group * value if kind == "times" else group + value
        before, stop = kind, end
    if not stop or before == "a" or text[stop : stop + 1] == "-":
        return None
    return Fraction(total + group), text[stop:]


def _fits(kind: str, before: str, group: int, *, is_first: bool) -> bool:
    """Return whether a word may follow the word before it inside a group."""
    if kind == "times":
        return before in ("ones", "tens", "a") and 0 < group < 100
    if kind == "a":
        return is_first
    if kind == "tens":
        return before in ("", "times", "scale", "and")
    return before in ("", "times", "scale", "and") or (before == "tens" and group % 10 == 0)


def _words(text: str) -> list[tuple[str, int, int, int]]:
    """Return kind, value, start and end of the number words at the start of a text."""
    words, place = [], 0
    while match := _WORD.match(text, place):
        word = match[1].lower()
        end = match.end(1)
        if word in _ONES:
            # Only a digit may follow tens.
            if words and words[-1][0] == "tens" and not 0 < _ONES[word] < 10:
                words.append(("wrong", 0, place, end))
                break
            words.append(("ones", _ONES[word], place, end))
        elif word in _TENS:
            words.append(("tens", _TENS[word], place, end))
        elif word in _TIMES:
            words.append(("times", _TIMES[word], place, end))
        elif word in _GROUPS:
            words.append(("scale", _GROUPS[word], place, end))
        elif word == "and" and words:
            words.append(("and", 0, place, end))
        elif word == "a" and not words:
            words.append(("a", 1, place, end))
        else:
            break
        place = match.end()
    return words
