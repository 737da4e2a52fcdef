"""Read and compare exact numbers, with or without a unit, in cleaned texts."""

import dataclasses
import re
from decimal import Decimal
from fractions import Fraction

from prism_jax.rewards import number_words, units

RELATIVE_TOLERANCE = Fraction(1, 10**6)
# A larger power of ten is left as text: its exact value would need as many digits.
MAX_EXPONENT = 400

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]\s*)?(?:
        (?:(?P<whole>\d+)\s*)?\\frac\s*(?:\{{\s*(?P<n>[-+]?\d+(?:\.\d+)?)\s*\}}|(?P<n1>\d))
                                 \s*(?:\{{\s*(?P<d>\d+(?:\.\d+)?)\s*\}}|(?P<d1>\d))
      | (?:(?P<whole2>\d+)\s+)?(?P<n2>\d+(?:\.\d+)?)\s*/\s*(?P<d2>\d+(?:\.\d+)?)(?![\d.])
      | (?P<decimal>{_PLAIN})(?:[eE](?P<e>[-+]?\d+)(?![\d.]))?
        (?:\s*[*xX]\s*10\s*\^\s*(?:\{{\s*(?P<ten>[-+]?\d+)\s*\}}|(?P<ten1>[-+]?\d+)))?
      | 10\s*\^\s*(?:\{{\s*(?P<power>[-+]?\d+)\s*\}}|(?P<power1>[-+]?\d+))
    )""",
    re.VERBOSE,
)
_POWER_OF_TEN = re.compile(r"(?P<sign>[-+]\s*)?10\s*\^\s*\{?\s*(?P<power>[-+]?\d+)\s*\}?")
_SPACED = re.compile(r"\d{1,3}(?: \d{3})+(?:\.\d+)?")
_CURRENCY = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<symbol>\\?\$|US\$|USD|[€£¥₹]|Rs\.?)\s*(?P<rest>[-+]?[\d.].*)"
)
_APPROXIMATE = re.compile(
    r"(?:\\approx|~|about|approximately|approx\.?|around|roughly|exactly|precisely|only|just"
    r"|a total of|total of|total)\s*(?=\S)"
)
_NEGATIVE = re.compile(r"^(?:negative|minus) (?=[\d.])", re.IGNORECASE)
_EXTENT = re.compile(
    r"\s+(?:long|wide|tall|high|deep|thick|old|apart|away|altogether"
    r"|in (?:total|all|length|width|height|area|volume|perimeter|diameter))$"
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"\s*(?:an? )?({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
# 12K, 1.2M: without a blank, where `12 K` is a temperature and `2m` a length.
_SHORT_SCALES = {"k": 3, "K": 3, "M": 6, "B": 9, "bn": 9}
_SHORT_SCALE = re.compile(r"(k|K|M|B|bn)(?=$| [A-Za-z])")
_SHORT_PRICES = _SHORT_SCALES | {"m": 6, "b": 9, "T": 12, "t": 12, "mn": 6}
_SHORT_PRICE = re.compile(r" ?(k|K|M|m|mn|B|b|bn|T|t)$")
_REPEATING = re.compile(
    r"(?P<whole>-?\d*)\.(?P<digits>\d*)(?:\\overline ?\{(?P<line>\d{1,9})\}|\((?P<round>\d{1,9})\)"
    r"|\\dot ?\{?(?P<dot>\d)\}?)"
)
_UNIT_FRACTION = re.compile(
    r"\s*\\frac ?\{ ?([A-Za-z]{1,4}) ?\} ?\{ ?([A-Za-z]{1,4}(?:\^\{?\d\}?)?) ?\}"
)
_DIGITS = re.compile(r"(\d[\d,]*)(?:\.(\d+))?(?:(?:[eE]| ?[*x] ?10 ?\^ ?\{?)([-+]?\d{1,4}))?")
_TIME = (("s", 1),)
# Beside another unit of time: `2h 5m`, `1d 3h`.
_SHORT_TIMES = {"m": "min", "d": "day"}
_PERCENT = (("percent", 1),)
# "1990s" are years, "1990 s" seconds.
_DECADE = re.compile(r"(?:19|20)\d0'?s$")
_COMPOUND = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)(?:\s*,?\s*(?:and\s+)?|$)")


@dataclasses.dataclass(frozen=True)
class Quantity:
    """An exact value and its unit.

    unit: None if the text has none.
    is_fraction: written as a fraction, which is never a percentage.
    short_scale: the letter of `12K`, which may have another meaning.
    """

    value: Fraction
    unit: units.Unit | None
    is_fraction: bool = False
    short_scale: str = ""


def parse(text: str) -> Quantity | None:
    """Read a whole cleaned text as a number with an optional unit; None if it is not."""
    text = _APPROXIMATE.sub("", text.strip(), count=1) if text[:1] in "\\~aeopjrt" else text.strip()
    text = _NEGATIVE.sub("-", text)
    currency = _CURRENCY.fullmatch(text)
    if currency:
        rest = currency["rest"]
        short = _SHORT_PRICE.search(rest)
        if short:
            rest = rest[: short.start()]
        inner = parse(currency["sign"] + rest)
        unit = units.parse(currency["symbol"].lstrip("\\").rstrip("."))
        if inner is None or inner.unit not in (None, unit):
            return None
        return Quantity(inner.value * 10 ** _SHORT_PRICES.get(short[1] if short else "", 0), unit)
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    read = _leading_number(text)
    if read is None:
        return None
    value, rest = read
    is_fraction = bool(re.search(r"/|\\frac", text[: len(text) - len(rest)]))
    scale, short = _SCALE.match(rest), _SHORT_SCALE.match(rest)
    if scale:
        value, rest = value * 10 ** _SCALES[scale.group(1).lower()], rest[scale.end() :]
    elif short:
        value, rest = value * 10 ** _SHORT_SCALES[short[1]], rest[short.end() :]
    letter = short[1] if short else ""
    rest = _EXTENT.sub("", rest)
    if not rest.strip():
        return Quantity(value, None, is_fraction, letter)
    if re.fullmatch(r"'?s", rest) and _DECADE.match(text):
        return None
    rest = re.sub(r"^\s*(?:-\s*(?=[A-Za-z])|of (?:an? )?)", "", rest)
    if per := _UNIT_FRACTION.fullmatch(rest):
        rest = f" {per[1]}/{per[2]}"
    if text[0].isalpha():
        rest = re.sub(r"^ an? (?=[a-z]{3})", " ", rest)  # `half a cup`
    # "2abc" is a product of letters, "2 ants" and "2boxes" are things.
    if re.fullmatch("[A-Za-z]{1,3}", rest) and not units.is_known(rest):
        return None
    unit = units.parse(rest)
    return Quantity(value, unit, is_fraction, letter) if unit else _compound(text)


def _leading_number(text: str) -> tuple[Fraction, str] | None:
    """Return the value of the number at the start of a text, and the rest of the text."""
    text = re.sub(r"^(\d+) (?:out of|over) (\d+)$", r"\1/\2", text)
    match = _POWER_OF_TEN.match(text) or _NUMBER.match(text)
    repeating = _REPEATING.fullmatch(text)
    if repeating:
        return _repeating(repeating), ""
    if match is None:
        return number_words.parse(text)
    rest = text[match.end() :]
    part = number_words.part(rest) if match.group().isdecimal() else None
    if part is not None:
        return int(match.group()) + part[0], part[1]
    # "1.2.3", "3-5", "10:30", "2/3/4", "3!" and "1,23" are not numbers followed by a text.
    if re.match(r"[\d.,:!^/+*=<>_\\-]", rest) and not re.match(r"-[A-Za-z]", rest):
        return None
    value = _value({name: part for name, part in match.groupdict().items() if part})
    return None if value is None else (value, rest)


def _repeating(match: re.Match) -> Fraction:
    """Return `0.1\\overline{6}` or `0.1(6)` as 1/6."""
    whole, digits = match["whole"], match["digits"]
    period = match["line"] or match["round"] or match["dot"]
    tail = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits))
    head = Fraction(Decimal(f"{whole or 0}.{digits or 0}"))
    return head - tail if whole.startswith("-") else head + tail


def _value(parts: dict[str, str]) -> Fraction | None:
    negative = parts.get("sign", "").strip() == "-"
    top = parts.get("n") or parts.get("n1") or parts.get("n2")
    if top:
        bottom = Fraction(parts.get("d") or parts.get("d1") or parts["d2"])
        if bottom == 0:
            return None
        value = Fraction(parts.get("whole") or parts.get("whole2") or 0) + Fraction(top) / bottom
    else:
        ten = parts.get("ten") or parts.get("ten1") or parts.get("power") or parts.get("power1")
        exponent = int(ten or 0) + int(parts.get("e", 0))
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = Fraction(Decimal(parts.get("decimal", "1").replace(",", "")))
        value *= Fraction(10) ** exponent
    return -value if negative else value


def _compound(text: str) -> Quantity | None:
    """Read `1 hour 30 minutes`: the sum of numbers with smaller and smaller units."""
    matches, position = [], 0
    while position < len(text):
        match = _COMPOUND.match(text, position)
        if match is None:
            return None
        matches.append(match)
        position = match.end()
    symbols = [match.group(2) for match in matches]
    if any(_is_time(symbol) for symbol in symbols):
        symbols = [_SHORT_TIMES.get(symbol, symbol) for symbol in symbols]
    total, dimensions, last = Fraction(0), None, None
    for match, symbol in zip(matches, symbols, strict=True):
        unit = units.parse(symbol)
        if unit is None or dimensions not in (None, unit.dimensions):
            return None
        # `5 cm, 6 cm` are two lengths.
        if not units.is_known(symbol) or (last is not None and unit.factor >= last):
            return None
        last = unit.factor
        total, dimensions = total + Fraction(match.group(1)) * unit.factor, unit.dimensions
    return Quantity(total, units.Unit(Fraction(1), dimensions)) if dimensions else None


def _is_time(symbol: str) -> bool:
    unit = units.parse(symbol)
    return unit is not None and unit.dimensions == _TIME


def equal(answer: Quantity, truth: Quantity) -> bool:
    """Compare values and units.

    With units on both sides the dimensions must agree and the values are converted: 5 kg is
    5000 g, not 5 lb. A side without a unit is taken in the other side's unit (`12` for `12 cm`).
    """
    if answer.short_scale.lower() == truth.short_scale.lower() != "":
        return answer.short_scale == truth.short_scale and close(answer.value, truth.value)
    if answer.unit is None or truth.unit is None or not _both_measure(answer.unit, truth.unit):
        percents = [q for q in (answer, truth) if q.unit and q.unit.dimensions == _PERCENT]
        if len(percents) == 1:
            return _equal_percent(answer, truth)
        return close(answer.value, truth.value)
    if units.is_power_of_units(answer.unit) or units.is_power_of_units(truth.unit):
        return units.same_power(answer.unit, truth.unit) and close(answer.value, truth.value)
    if answer.unit.dimensions != truth.unit.dimensions:
        return False
    return close(answer.value * answer.unit.factor, truth.value * truth.unit.factor)


def _equal_percent(answer: Quantity, truth: Quantity) -> bool:
    """Compare with a percentage: 0.5 and 50 are 50 %, 0.125 is not 0.125 %.

    A bare number is read as a percentage only if it cannot be the share itself: not a fraction,
    not from 0 to 1, and if it is the truth, not up to 10, since 2 may be 200 %.
    """
    scaled = [q.value * (q.unit.factor if q.unit else 1) for q in (answer, truth)]
    if close(*scaled):
        return True
    bare = truth if answer.unit and answer.unit.dimensions == _PERCENT else answer
    if bare.is_fraction or abs(bare.value) <= 1 or (bare is truth and abs(bare.value) <= 10):
        return False
    return close(answer.value, truth.value)


def is_rounding(exact: Quantity, rounded: Quantity, text: str) -> bool:
    """Return whether `rounded`, written as `text`, is `exact` rounded to the digits of the text.

    Rounding may change at most a third of the value.
    """
    unit = exact.unit or rounded.unit
    values = [q.value * (q.unit or unit or units.ONE).factor for q in (exact, rounded)]
    if exact.unit and rounded.unit and exact.unit.dimensions != rounded.unit.dimensions:
        return False
    half = half_digit(text) * (rounded.unit or unit or units.ONE).factor
    difference = abs(values[0] - values[1])
    return difference <= half * Fraction(1000001, 1000000) and 3 * difference <= abs(values[1])


def half_digit(text: str) -> Fraction:
    """Return half a unit of the last digit that a decimal number is written in."""
    match = _DIGITS.search(text)
    if match is None or re.search(r"/|\\frac", text):
        return Fraction(0)
    whole = match[1].replace(",", "")
    power = -len(match[2]) if match[2] else len(whole) - len(whole.rstrip("0"))
    power += int(match[3] or 0)
    return Fraction(10) ** power / 2 if abs(power) <= MAX_EXPONENT else Fraction(0)


def _both_measure(answer: units.Unit, truth: units.Unit) -> bool:
    return bool(answer.dimensions) and bool(truth.dimensions)


def close(answer: Fraction, truth: Fraction) -> bool:
    """Compare exactly, but for the digits that a decimal expansion must drop.

    Whole numbers must be equal. Otherwise the relative error is at most 1e-6 if a side has no
    finite decimal form (1/3 and 0.3333333), and the absolute error at most 1e-6 as well where
    both have (1234567.1 is not 1234567.2).
    Source: PRISM verl/verl/utils/reward_score/mm_gad_no_llm.py:193 (1e-6).
    """
    if answer == truth:
        return True
    if truth == 0 or (answer.denominator == 1 and truth.denominator == 1):
        return False
    scale = abs(truth)
    if _has_finite_decimals(answer) and _has_finite_decimals(truth):
        scale = min(scale, 1)
    return abs(answer - truth) <= RELATIVE_TOLERANCE * scale


def _has_finite_decimals(value: Fraction) -> bool:
    rest = value.denominator
    rest >>= (rest & -rest).bit_length() - 1
    while rest % 5 == 0:
        rest //= 5
    return rest == 1
