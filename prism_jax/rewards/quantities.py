"""Read a number with or without a unit from a cleaned text, exactly, and compare two of them."""

import dataclasses
import re
from decimal import Decimal
from fractions import Fraction

from prism_jax.rewards import units

RELATIVE_TOLERANCE = Fraction(1, 10**6)
# A power of ten beyond this is left as text: an exact value would need that many digits.
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
_APPROXIMATE = re.compile(r"(?:\\approx|~|about|approximately|approx\.?|around|roughly)\s*(?=\S)")
_EXTENT = re.compile(
    r"\s+(?:long|wide|tall|high|deep|thick|old|apart|away|altogether"
    r"|in (?:total|all|length|width|height|area|volume|perimeter|diameter))$"
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"\s*({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
_DIGIT_WORDS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen".split()
    )
} | {
    word: 10 * value
    for value, word in enumerate(
        "twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2
    )
}
_NUMBER_WORD = re.compile(
    rf"({'|'.join(_DIGIT_WORDS)})(?:[- ]({'|'.join(list(_DIGIT_WORDS)[1:10])}))?(?![A-Za-z-])",
    re.IGNORECASE,
)
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8,
          "tenth": 10}  # fmt: skip
_FRACTION_WORD = re.compile(
    rf"(?:(?P<n>an?|{'|'.join(_DIGIT_WORDS)})[- ](?P<d>{'|'.join(_PARTS)}|halve)s?|(?P<half>half))"
    r"(?![A-Za-z-])",
    re.IGNORECASE,
)
_REPEATING = re.compile(r"(-?\d*)\.(\d*)\\overline ?\{(\d{1,9})\}")
# "1990s" are years, "1990 s" seconds.
_DECADE = re.compile(r"(?:19|20)\d0'?s$")
_COMPOUND = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)(?:\s*,?\s*(?:and\s+)?|$)")


@dataclasses.dataclass(frozen=True)
class Quantity:
    """Hold an exact value and its unit; `unit` None: none was written."""

    value: Fraction
    unit: units.Unit | None


def parse(text: str) -> Quantity | None:
    """Read a whole cleaned text as one number with an optional unit; None when it is not one."""
    text = _APPROXIMATE.sub("", text.strip(), count=1) if text[:1] in "\\~aAr" else text.strip()
    currency = _CURRENCY.fullmatch(text)
    if currency:
        inner = parse(currency["sign"] + currency["rest"])
        unit = units.parse(currency["symbol"].lstrip("\\").rstrip("."))
        if inner is None or inner.unit not in (None, unit):
            return None
        return Quantity(inner.value, unit)
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    read = _leading_number(text)
    if read is None:
        return None
    value, rest = read
    scale = _SCALE.match(rest)
    if scale:
        value, rest = value * 10 ** _SCALES[scale.group(1).lower()], rest[scale.end() :]
    if not rest.strip():
        return Quantity(value, None)
    rest = _EXTENT.sub("", rest)
    if not rest:
        return Quantity(value, None)
    if re.fullmatch(r"'?s", rest) and _DECADE.match(text):
        return None
    rest = re.sub(r"^\s*(?:-\s*(?=[A-Za-z])|of\s+)", "", rest)
    # "2abc" is a product of letters, "2 ants" and "2boxes" are things.
    if re.fullmatch("[A-Za-z]{1,3}", rest) and not units.is_known(rest):
        return None
    unit = units.parse(rest)
    return Quantity(value, unit) if unit else _compound(text)


def _leading_number(text: str) -> tuple[Fraction, str] | None:
    """Return the value of the number that a text starts with, and the rest behind it."""
    text = re.sub(r"^(\d+) out of (\d+)$", r"\1/\2", text)
    found = _POWER_OF_TEN.match(text) or _NUMBER.match(text)
    repeating = _REPEATING.fullmatch(text)
    if repeating:
        return _repeating(*repeating.groups()), ""
    part = _FRACTION_WORD.match(text)
    if part:
        return _part(part), text[part.end() :]
    if found is None:
        word = _NUMBER_WORD.match(text)
        if word is None:
            return None
        tens, ones = word.group(1).lower(), (word.group(2) or "zero").lower()
        if word.group(2) and _DIGIT_WORDS[tens] < 20:
            return None
        return Fraction(_DIGIT_WORDS[tens] + _DIGIT_WORDS[ones]), text[word.end() :]
    rest = text[found.end() :]
    # "1.2.3", "3-5", "10:30", "2/3/4", "3!" and "1,23" are no numbers with something behind.
    if re.match(r"[\d.,:!^/+*=<>_\\-]", rest) and not re.match(r"-[A-Za-z]", rest):
        return None
    value = _value({name: part for name, part in found.groupdict().items() if part})
    return None if value is None else (value, rest)


def _repeating(whole: str, digits: str, period: str) -> Fraction:
    """Return `0.1\\overline{6}` as 1/6."""
    tail = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits))
    head = Fraction(Decimal(f"{whole or 0}.{digits or 0}"))
    return head - tail if whole.startswith("-") else head + tail


def _part(found: re.Match) -> Fraction:
    """Return `two thirds`, `a quarter`, `half`."""
    if found["half"]:
        return Fraction(1, 2)
    parts = _PARTS.get(found["d"].lower(), 2)
    return Fraction(_DIGIT_WORDS.get(found["n"].lower(), 1), parts)


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
    """Read `1 hour 30 minutes`: several numbers with units of one dimension, added up."""
    total, dimensions, position = Fraction(0), None, 0
    while position < len(text):
        found = _COMPOUND.match(text, position)
        unit = units.parse(found.group(2)) if found else None
        if unit is None or dimensions not in (None, unit.dimensions):
            return None
        if not units.is_known(found.group(2)):
            return None
        total, dimensions = total + Fraction(found.group(1)) * unit.factor, unit.dimensions
        position = found.end()
    return Quantity(total, units.Unit(Fraction(1), dimensions)) if dimensions else None


def equal(answer: Quantity, truth: Quantity) -> bool:
    """Compare values and units.

    With units on both sides the dimensions must agree and the values are converted: 5 kg is
    5000 g, not 5 lb. A side without a unit is taken in the other side's unit (`12` for `12 cm`);
    for percentages a bare 0.5 is 50 % as well.
    """
    if answer.unit is None or truth.unit is None or not _both_measure(answer.unit, truth.unit):
        unit = answer.unit or truth.unit
        if close(answer.value, truth.value):
            return True
        if unit is None or unit.dimensions != (("percent", 1),):
            return False
        scaled = [q.value * (q.unit.factor if q.unit else 1) for q in (answer, truth)]
        return close(*scaled)
    if answer.unit.dimensions != truth.unit.dimensions:
        return False
    return close(answer.value * answer.unit.factor, truth.value * truth.unit.factor)


def _both_measure(one: units.Unit, other: units.Unit) -> bool:
    return bool(one.dimensions) and bool(other.dimensions)


def close(answer: Fraction, truth: Fraction) -> bool:
    """Compare exactly up to the digits that a decimal expansion must drop.

    Whole numbers must be equal. Otherwise the relative error is at most 1e-6 where one side has
    no finite decimal form (1/3 and 0.3333333), and the absolute error at most 1e-6 as well where
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
