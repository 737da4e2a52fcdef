"""Compare times of day, dates, ratios and spans of years; None where a text is none of these."""

import datetime
import re

from prism_jax.rewards import quantities

_HALF = r"(?P<half>[ap]\.?\s?m\b\.?)"
_TIME = re.compile(
    rf"(?P<h>\d{{1,2}})(?::(?P<m>[0-5]\d)(?::(?P<s>[0-5]\d))?|\s*o'?clock)\s*{_HALF}?",
    re.IGNORECASE,
)
_HOUR = re.compile(rf"(?P<h>\d{{1,2}})(?P<m>)(?P<s>)\s*{_HALF}", re.IGNORECASE)
# Hours that a clock of 12 hours does not have.
_ONLY_OF_24 = frozenset((0, *range(13, 25)))
_NAMED = {
    "noon": "12:00 pm",
    "12 noon": "12:00 pm",
    "midnight": "12:00 am",
    "12 midnight": "12:00 am",
}
_NUMBER = r"\d+(?:\.\d+)?"
_RATIO = re.compile(rf"{_NUMBER}(?:\s*:\s*{_NUMBER})+|{_NUMBER} to {_NUMBER}")
_SPAN = re.compile(r"(?:from )?(\d{4})\s*(?:-|to)\s*(\d{4})")
_MONTHS = {
    name: number
    for number, names in enumerate(
        "january jan,february feb,march mar,april apr,may,june jun,july jul,august aug,"
        "september sept sep,october oct,november nov,december dec".split(","),
        start=1,
    )
    for name in names.split()
}
_MONTH = "|".join(_MONTHS)
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>\d{4})"
_DATES = (
    re.compile(rf"(?P<month>{_MONTH})\.? (?:the )?{_DAY}(?:,? {_YEAR})?", re.IGNORECASE),
    re.compile(rf"(?:the )?{_DAY} (?:of )?(?P<month>{_MONTH})\.?(?:,? {_YEAR})?", re.IGNORECASE),
    re.compile(rf"(?P<month>{_MONTH})\.?(?P<day>),? {_YEAR}", re.IGNORECASE),
    re.compile(rf"{_YEAR}[-/](?P<month>\d{{1,2}})[-/](?P<day>\d{{1,2}})"),
)


def same(answer: str, truth: str) -> bool | None:
    """Compare two texts, if one is a time of day, a span of years or a ratio.

    None: neither is, or a colon or a hyphen has another meaning.
    """
    answer, truth = (_NAMED.get(text.lower(), text) for text in (answer, truth))
    if not any(character.isdigit() for character in truth):
        return None
    spans = _SPAN.fullmatch(answer), _SPAN.fullmatch(truth)
    if all(spans):
        return spans[0].groups() == spans[1].groups()
    times = [_TIME.fullmatch(text) or _HOUR.fullmatch(text) for text in (answer, truth)]
    if all(times):
        return _same_time(*times)
    ratios = [_RATIO.fullmatch(text) for text in (answer, truth)]
    if all(ratios):
        a, t = (
            [quantities.parse(n.strip()).value for n in re.split(":| to ", text)]
            for text in (answer, truth)
        )
        return len(a) == len(t) and all(
            a[0] * other == t[0] * one for one, other in zip(a, t, strict=True)
        )
    # A time or a ratio equals no other kind; a colon in a phrase is left to other rules.
    return False if any(times) or any(ratios) else None


def date(text: str) -> tuple[int, int, int] | None:
    """Read year, month and day; 0 for a missing year or day."""
    for pattern in _DATES:
        match = pattern.fullmatch(text)
        if not match:
            continue
        month = _MONTHS.get(match["month"].lower()) or int(match["month"])
        year, day = int(match["year"] or 0), int(match["day"] or 0)
        try:
            datetime.date(year or 2000, month, day or 1)
        except ValueError:
            return None
        return year, month, day
    return None


def _same_time(answer: re.Match, truth: re.Match) -> bool:
    clock = [
        (int(time["h"]), int(time["m"] or 0), int(time["s"] or 0), (time["half"] or "")[:1].lower())
        for time in (answer, truth)
    ]
    halves = [half for *_, half in clock]
    if not any(halves) or not any(hours in _ONLY_OF_24 for hours, *_ in clock):
        # A missing am or pm is forgiven, like a missing unit.
        return clock[0][:3] == clock[1][:3] and halves[0] in ("", halves[1] or halves[0])
    if any(half == "a" and hours > 12 for hours, *_, half in clock):
        return False
    of_day = [
        ((hours % 12 + 12 * (half == "p")) if half else hours, minutes, seconds)
        for hours, minutes, seconds, half in clock
    ]
    return of_day[0] == of_day[1]
