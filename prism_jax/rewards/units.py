"""Units of measure as a factor and powers of base dimensions, so that 10 cm is not 10 m.

A unit that is not in the tables is a word (`5 apples`), equal only to itself.
"""

import dataclasses
import re
from fractions import Fraction

Dimensions = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A unit: its value in base units, and the powers of these, sorted by name."""

    factor: Fraction
    dimensions: Dimensions


def _make(factor: str | int | Fraction, **powers: int) -> Unit:
    return Unit(Fraction(factor), tuple(sorted(powers.items())))


_PREFIXES = {
    "p": ("pico", -12), "n": ("nano", -9), "μ": ("micro", -6), "m": ("milli", -3),
    "c": ("centi", -2), "d": ("deci", -1), "k": ("kilo", 3), "M": ("mega", 6), "G": ("giga", 9),
    "T": ("tera", 12),
}  # fmt: skip
_NEWTON = {"kg": 1, "m": 1, "s": -2}
# symbol, names, unit. All prefixes are allowed.
_METRIC = (
    ("m", "meter metre", _make(1, m=1)),
    ("g", "gram gramme", _make("1/1000", kg=1)),
    ("L", "liter litre", _make("1/1000", m=3)),
    ("l", "", _make("1/1000", m=3)),
    ("N", "newton", _make(1, **_NEWTON)),
    ("J", "joule", _make(1, kg=1, m=2, s=-2)),
    ("W", "watt", _make(1, kg=1, m=2, s=-3)),
    ("Pa", "pascal", _make(1, kg=1, m=-1, s=-2)),
    ("Hz", "hertz", _make(1, cycle=1, s=-1)),
    ("V", "volt", _make(1, V=1)),
    ("A", "ampere amp", _make(1, A=1)),
    ("Ω", "ohm", _make(1, A=-1, V=1)),
    ("C", "coulomb", _make(1, A=1, s=1)),
    ("F", "farad", _make(1, A=1, V=-1, s=1)),
    ("T", "tesla", _make(1, V=1, m=-2, s=1)),
    ("K", "kelvin", _make(1, K=1)),
    ("mol", "mole", _make(1, mol=1)),
    ("eV", "electronvolt", _make(1, eV=1)),
    ("cal", "calorie", _make("4.184", kg=1, m=2, s=-2)),
    ("s", "second", _make(1, s=1)),
)
# symbols in their exact case, names in any case, unit.
_OTHER = (
    ("sec secs", "sec secs", _make(1, s=1)),
    ("min mins", "minute min mins", _make(60, s=1)),
    ("h hr hrs", "hour hr hrs", _make(3600, s=1)),
    ("", "day", _make(86400, s=1)),
    ("wk wks", "week", _make(604800, s=1)),
    ("", "month", _make(1, month=1)),
    ("yr yrs", "year yr yrs", _make(12, month=1)),
    ("in", "inch", _make("0.0254", m=1)),
    ("ft", "foot feet ft", _make("0.3048", m=1)),
    ("yd yds", "yard", _make("0.9144", m=1)),
    ("mi", "mile", _make("1609.344", m=1)),
    ("lb lbs", "pound lb lbs", _make("0.45359237", kg=1)),
    ("oz", "ounce oz", _make("0.028349523125", kg=1)),
    ("", "tonne ton", _make(1000, kg=1)),
    ("ha", "hectare", _make(10000, m=2)),
    ("", "acre", _make("4046.8564224", m=2)),
    ("gal", "gallon", _make("0.003785411784", m=3)),
    ("mph", "mph", _make("0.44704", m=1, s=-1)),
    ("mps", "mps", _make(1, m=1, s=-1)),
    ("kph kmph kmh", "kph kmph kmh", _make("5/18", m=1, s=-1)),
    ("cc", "", _make("1/1000000", m=3)),
    ("kWh", "kilowatt-hour kilowatthour", _make(3600000, kg=1, m=2, s=-2)),
    ("Å", "angstrom", _make(Fraction(1, 10**10), m=1)),
    ("cms", "", _make("1/100", m=1)),
    ("kms", "", _make(1000, m=1)),
    ("kgs", "", _make(1, kg=1)),
    ("uF", "", _make(Fraction(1, 10**6), A=1, V=-1, s=1)),
    ("uC", "", _make(Fraction(1, 10**6), A=1, s=1)),
    ("uA", "", _make(Fraction(1, 10**6), A=1)),
    ("um", "micron", _make(Fraction(1, 10**6), m=1)),
    ("", "kilohm", _make(1000, A=-1, V=1)),
    ("Nm", "", _make(1, kg=1, m=2, s=-2)),
    ("bar", "bar", _make(100000, kg=1, m=-1, s=-2)),
    ("atm", "atmosphere atm", _make(101325, kg=1, m=-1, s=-2)),
    ("M", "molar", _make(1000, mol=1, m=-3)),
    ("mM", "millimolar", _make(1, mol=1, m=-3)),
    ("KB kB", "kilobyte", _make(1, kilobyte=1)),
    ("MB", "megabyte", _make(1, megabyte=1)),
    ("GB", "gigabyte", _make(1, gigabyte=1)),
    ("TB", "terabyte", _make(1, terabyte=1)),
    ("Kb kb", "kilobit", _make(1, kilobit=1)),
    ("Mb", "megabit", _make(1, megabit=1)),
    ("Gb", "gigabit", _make(1, gigabit=1)),
    ("dB", "decibel", _make(1, decibel=1)),
    ("lx", "lux", _make(1, lux=1)),
    ("hp", "horsepower", _make(1, horsepower=1)),
    ("ly", "", _make(1, light_year=1)),
    ("° deg", "degree deg", _make(1, degree=1)),
    ("rad", "radian", _make(1, radian=1)),
    ("°C", "celsius", _make(1, celsius=1)),
    ("°F", "fahrenheit", _make(1, fahrenheit=1)),
    ("% pct", "percent pct percentage", _make("1/100", percent=1)),
    ("$ USD US$", "dollar usd buck", _make(1, USD=1)),
    ("¢", "cent", _make("1/100", USD=1)),
    ("€ EUR", "euro eur", _make(1, EUR=1)),
    ("£ GBP", "gbp", _make(1, GBP=1)),
    ("₹ INR Rs", "rupee inr", _make(1, INR=1)),
    ("元 ¥ CNY RMB", "yuan rmb cny", _make(1, CNY=1)),
    ("米", "", _make(1, m=1)),
    ("厘米", "", _make("1/100", m=1)),
    ("毫米", "", _make("1/1000", m=1)),
    ("千米 公里", "", _make(1000, m=1)),
    ("克", "", _make("1/1000", kg=1)),
    ("千克 公斤", "", _make(1, kg=1)),
    ("秒", "", _make(1, s=1)),
    ("分钟", "", _make(60, s=1)),
    ("小时", "", _make(3600, s=1)),
    ("天", "", _make(86400, s=1)),
    ("度", "", _make(1, degree=1)),
)


def _symbol_table() -> dict[str, Unit]:
    table = {}
    for symbol, _, unit in _METRIC:
        for prefix, (_, power) in _PREFIXES.items():
            scaled = unit.factor * Fraction(10) ** power
            table[prefix + symbol] = Unit(scaled, unit.dimensions)
    # Spelled-out symbols win over a prefix: "min" is a minute, "ft" a foot, "cd" nothing.
    table |= {symbol: unit for symbol, _, unit in _METRIC}
    return table | {symbol: unit for symbols, _, unit in _OTHER for symbol in symbols.split()}


def _name_table() -> dict[str, Unit]:
    table = {}
    for _, names, unit in _METRIC:
        for name in names.split():
            for prefix, power in _PREFIXES.values():
                scaled = Unit(unit.factor * Fraction(10) ** power, unit.dimensions)
                table[prefix + name] = table[prefix + name + "s"] = scaled
            table[name] = table[name + "s"] = unit
    for _, names, unit in _OTHER:
        for name in names.split():
            table[name] = table[name + "s"] = unit
    table["inches"] = table["inch"]
    return table


ONE = _make(1)
_SYMBOLS = _symbol_table()
_NAMES = _name_table()
_BY_LOWER_CASE: dict[str, set[Unit]] = {}
for _symbol, _unit in _SYMBOLS.items():
    _BY_LOWER_CASE.setdefault(_symbol.lower(), set()).add(_unit)
# Symbols that mean the same unit in any case; `pc` is a piece or a parsec rather than pC.
_ANY_CASE = {
    symbol: next(iter(units))
    for symbol, units in _BY_LOWER_CASE.items()
    if len(units) == 1 and symbol[0] != "p"
}
# Units that say only that there is a unit, with the power of a length (0: any).
_GENERIC = {
    "unit": 0,
    "units": 0,
    "square units": 2,
    "sq units": 2,
    "units squared": 2,
    "units^2": 2,
    "cubic units": 3,
    "units^3": 3,
}
_POWER_WORDS = (
    (re.compile(r"\b(?:square|sq\.?)\s+([A-Za-z]+)"), r"\1^2"),
    (re.compile(r"\b(?:cubic|cu\.?)\s+([A-Za-z]+)"), r"\1^3"),
    (re.compile(r"\b([A-Za-z]+)\s+squared\b"), r"\1^2"),
    (re.compile(r"\b([A-Za-z]+)\s+cubed\b"), r"\1^3"),
    (re.compile(r"\belectron[ -]volts?\b", re.IGNORECASE), "eV"),
    (re.compile(r"^(?:US|U\.S\.) (?=dollars?$)"), ""),
    (re.compile(r"\bms(?=\^\{?-[12])"), "m s"),
    (re.compile(r"\bper cent\b", re.IGNORECASE), "percent"),
    (re.compile(r"\bdegrees?\s+(?=celsius|fahrenheit)", re.IGNORECASE), ""),
    (re.compile(r"°\s+(?=[CF]\b)"), "°"),
)
_PER = re.compile(r"\s*/\s*|\s+per\s+")
_TIMES = re.compile(r"\s*\*\s*|\s+")
_FACTOR = re.compile(r"([^\d^{}\s]+)(?:\^?\{?\s*(-?\d)\s*\}?)?")
# Words that do not name a counted thing.
_NOT_A_UNIT = {
    "or", "and", "not", "no", "is", "are", "than", "more", "less", "at", "least", "most", "but",
    "maybe", "perhaps", "possibly", "if", "wrong", "incorrect", "plus", "minus", "times", "x",
    "million", "billion", "half", "approximately", "about", "above", "below", "either", "other",
    "others", "because", "since", "remainder", "through",
    "dozen", "probably", "likely", "think", "guess", "nearly", "almost", "around", "roughly",
    "surely",
    # Operations on the number: `7 squared` is 49, `7 halves` are 3.5.
    "lakh", "lakhs", "crore", "crores", "dozens", "quadrillion",
    "factorial", "squared", "cubed", "doubled", "tripled", "halved", "divided", "multiplied",
    "choose", "over", "mod", "modulo", "except", "reciprocal", "inverse", "percentile", "halves",
    "thirds", "fourths", "quarters", "fifths", "sixths", "sevenths", "eighths", "ninths", "tenths",
    "hundredths", "thousandths", "millionths",
    # Another answer, or none.
    "unknown", "undefined", "undecided", "unsure", "unclear", "none", "nothing", "neither", "never",
    "nope", "hmm", "sorry", "wait", "nil", "null", "nan", "infinite", "like", "zero", "one", "two",
    "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty",
}  # fmt: skip
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]{2,}|[\u4e00-\u9fff]{1,3}")


def parse(text: str) -> Unit | None:
    """Read a whole text as a unit; None if it is not.

    Names are read in any case, symbols as written (`mW` is not `MW`), and in lower case only if no
    symbol is written so (`KG`). A generic `units` has no dimension.
    """
    text = text.strip().rstrip(".").strip()
    power = _GENERIC.get(text.replace("{2}", "2").replace("{3}", "3").lower())
    if power is not None:
        return _make(1, units=power) if power else _make(1)
    return _known(text) or _counted_thing(text)


def is_known(text: str) -> bool:
    """Return whether a text is a unit of measure from the tables."""
    return _known(text.strip()) is not None


def is_power_of_units(unit: Unit) -> bool:
    """Return whether a unit says only that it is one of area or volume: `square units`."""
    return unit.dimensions[:1] in ((("units", 2),), (("units", 3),))


def same_power(first: Unit, second: Unit) -> bool:
    """Return whether two units are powers of a length, of whatever unit, with one exponent."""
    powers = [dict(unit.dimensions) for unit in (first, second)]
    if any(len(power) != 1 for power in powers):
        return False
    return powers[0].get("units", powers[0].get("m")) == powers[1].get("units", powers[1].get("m"))


def is_generic(text: str) -> bool:
    """Return whether a text says only that there is a unit."""
    return text.strip().lower() in _GENERIC


def _known(text: str) -> Unit | None:
    for pattern, power in _POWER_WORDS:
        text = pattern.sub(power, text)
    total, powers = Fraction(1), {}
    for place, group in enumerate(_PER.split(text)):
        for written in _TIMES.split(group.strip("()[] ")):
            match = _FACTOR.fullmatch(written)
            unit = _look_up(match.group(1)) if match else None
            if unit is None or (match.group(2) and unit.dimensions == (("percent", 1),)):
                return None
            power = int(match.group(2) or 1) * (1 if place == 0 else -1)
            total *= unit.factor**power
            for name, exponent in unit.dimensions:
                powers[name] = powers.get(name, 0) + exponent * power
    return Unit(total, tuple(sorted((name, power) for name, power in powers.items() if power)))


def _look_up(symbol: str) -> Unit | None:
    unit = _SYMBOLS.get(symbol) or _NAMES.get(symbol.lower())
    if unit is None and len(symbol) > 1:
        # `KG` and `KW` have a single meaning, `mhz` could be MHz or mHz.
        unit = _SYMBOLS.get(symbol.lower()) or _ANY_CASE.get(symbol.lower())
    return unit


def _counted_thing(text: str) -> Unit | None:
    names = text.lower().replace("(s)", "s").split()
    if names == ["times"]:
        return Unit(Fraction(1), (("time", 1),))
    if len(names) == 3 and names[1] == "of":
        # `lines of symmetry`: the first word is counted.
        names = [f"{names[0]}-of-{names[2]}"] if _WORD.fullmatch(names[2]) else names
    if not 1 <= len(names) <= 3 or any(
        name in _NOT_A_UNIT or not _WORD.fullmatch(name) for name in names
    ):
        return None
    last = names[-1]
    for plural, singular in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("s", "")):
        if last.endswith(plural) and len(last) > len(plural) + 1 and not last.endswith("ss"):
            last = last.removesuffix(plural) + singular
            break
    return Unit(Fraction(1), ((" ".join([*names[:-1], last]), 1),))
