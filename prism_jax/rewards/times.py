"""Compare times of day, dates and spans of years; None for other texts."""

import datetime
import re

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
    """Compare two times of day, or two spans of years; None for other texts."""
    answer, truth = (_NAMED.get(text.lower(), text) for text in (answer, truth))
    spans = _SPAN.fullmatch(answer), _SPAN.fullmatch(truth)
    if all(spans):
        return spans[0].groups() == spans[1].groups()
    times = [_TIME.fullmatch(text) or _HOUR.fullmatch(text) for text in (answer, truth)]
    if all(times):
        return _same_time(*times)
    return None


def is_time(text: str) -> bool:
    """Return whether a text may be a time of day, with a colon or with am and pm."""
    return bool(_TIME.fullmatch(text) or _HOUR.fullmatch(text) or text.lower() in _NAMED)


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
