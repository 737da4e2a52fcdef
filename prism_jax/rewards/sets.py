"""Compare sets of real numbers: inequalities, intervals, unions, set builders, all but a point.

    x < 1 or x > 2     (-\\infty,1)\\cup(2,\\infty)     \\{x \\mid x < 1\\} \\cup ...     x \\ne 3

A bare `(1,2)` is a point or an interval: it is read as an interval only if the other side can be
nothing else.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from prism_jax.rewards import quantities

_LEAST, _MOST = "-\\infty", "\\infty"
_RELATION = re.compile(r" ?(\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<|>) ?")
_MIRRORED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
_NAME = r"[A-Za-z]|\\(?:alpha|beta|theta|phi|lambda|omega|gamma)"
_VARIABLE = re.compile(_NAME)
_MEMBER = re.compile(rf"({_NAME}) ?(?:\\in(?![A-Za-z])|\bin\b) ?(?=[(\[\]{{\\])")
_BUILDER = re.compile(
    rf"\\?\{{ ?({_NAME})(?: ?\\in ?\\mathbb ?\{{?R\}}?)? ?"
    r"(?:\\mid(?![A-Za-z])|\\vert|[|:]) ?(.*?)\\?\}",
    re.DOTALL,
)
_BUILT = re.compile(rf"\\?\{{ ?(?:{_NAME})[^{{}}|]{{0,40}}(?:\\mid(?![A-Za-z])|\|)")
_REALS = re.compile(r"\\mathbb ?\{?R\}?|\\R|(?:the set of )?(?:all )?real numbers|all reals")
_EMPTY = re.compile(
    r"\\(?:emptyset|varnothing)(?![A-Za-z])|\\?\{ ?\\?\}|(?:the )?(?:empty|null) set|no solutions?"
)
_EXCEPT = re.compile(
    rf"(?:{_REALS.pattern})(?: ?\\(?:setminus|backslash) ?| ?- ?(?=\\?\{{)"
    r"|,? (?:except|but|other than)(?: for)? )"
    rf"(?:(?:{_NAME}) ?= ?)?(?P<points>.+)"
)
# `x \in \mathbb{R}` beside a condition says nothing more.
_REAL_NUMBER = re.compile(
    rf"^(?:{_NAME}) ?\\in ?\\mathbb ?\{{?R\}}?(?: ?, ?(?:and )?| and )(?=\S)"
    rf"|(?: ?, ?(?:and )?| and )(?:{_NAME}) ?\\in ?\\mathbb ?\{{?R\}}?$"
)
_NOT_EQUAL = re.compile(rf"({_NAME}) ?\\ne ?([^<>=]+)")
_UNION = re.compile(
    r" ?\\(?:cup|lor|vee)(?![A-Za-z]) ?| or |, or |(?<=[)\]}]) ?(?:U|union) ?(?=[(\[{\\])"
)
_BOTH = re.compile(r",? and |, ?| ?\\(?:land|wedge)(?![A-Za-z]) ?|; ?")
_INTERVAL = re.compile(r"([(\[\]])([^()\[\]]*)([)\[\]])")
_IN_WORDS = re.compile(
    rf"(?:(?P<name>{_NAME}) (?:is|must be) )?"
    r"(?P<words>(?:greater|more|larger|less|smaller|fewer) than(?: or equal to)?|at (?:least|most)"
    r"|(?:no|not) (?:greater|more|larger|less|smaller|fewer) than) (?P<end>\S.*)"
)
_SIZE = re.compile(rf"\| ?(?P<name>{_NAME}) ?\|{_RELATION.pattern}(?P<end>\S.*)")
_MAX_PIECES = 12

Same = Callable[[str, str], bool]


@dataclasses.dataclass(frozen=True)
class Piece:
    """An interval; a point has two equal closed ends."""

    low: str
    high: str
    low_closed: bool
    high_closed: bool


@dataclasses.dataclass(frozen=True)
class RealSet:
    """A union of pieces; the variable's name is "" if the text has none.

    is_explicit: the text cannot be read as something else.
    """

    name: str
    pieces: tuple[Piece, ...]
    is_explicit: bool


def same(answer: str, truth: str, compare: Same) -> bool | None:
    """Compare two texts as sets of numbers; None if they are not both sets."""
    given, wanted = _parse(answer), _parse(truth)
    if given is None or wanted is None:
        # A set builder must not be read as a list separated by its commas.
        is_builder = any(_BUILT.match(text) for text in (answer, truth))
        return False if is_builder else None
    if not (given.is_explicit or wanted.is_explicit):
        return None
    if given.name and wanted.name and given.name != wanted.name:
        return False
    return _same_pieces(_merged(given.pieces), _merged(wanted.pieces), compare)


def variable(text: str) -> str:
    """Return the name of the variable of a condition, "" if the text is none."""
    parsed = _parse(text)
    return parsed.name if parsed else ""


def _same_pieces(given: Sequence[Piece], wanted: Sequence[Piece], compare: Same) -> bool:
    """Compare in any order; ends need not be numbers."""
    unused = list(given)
    for piece in wanted:
        partner = next(
            (
                candidate
                for candidate in unused
                if (candidate.low_closed, candidate.high_closed)
                == (piece.low_closed, piece.high_closed)
                and compare(candidate.low, piece.low)
                and compare(candidate.high, piece.high)
            ),
            None,
        )
        if partner is None:
            return False
        unused.remove(partner)
    return not unused


def _parse(text: str) -> RealSet | None:
    if _EMPTY.fullmatch(text):
        return RealSet("", (), is_explicit=True)
    if match := _IN_WORDS.fullmatch(text):
        return _in_words(match)
    if not re.search(r"[<>\[(]|\\(?:le|ge|ne|in|cup|mathbb|R)(?![A-Za-z])|real", text):
        return None
    if _REALS.fullmatch(text):
        return RealSet("", (Piece(_LEAST, _MOST, False, False),), is_explicit=True)
    name = ""
    text = _REAL_NUMBER.sub("", text)
    match = _MEMBER.match(text)
    if match:
        inside = _parse(text[match.end() :])
        return inside and RealSet(match[1], inside.pieces, is_explicit=True)
    match = _BUILDER.fullmatch(text)
    if match:
        # In a builder, a comma means "and".
        is_plain = not re.search(r"[(\[]", match[2])
        inside = _parse(match[2].replace(",", " and") if is_plain else match[2])
        if inside is None or inside.name not in ("", match[1]):
            return None
        return RealSet("", inside.pieces, is_explicit=True)
    parts = _UNION.split(text)
    if len(parts) > _MAX_PIECES:
        return None
    pieces, names, explicit = [], set(), len(parts) > 1
    for part in parts:
        parsed = _piece(part.strip())
        if parsed is None:
            return None
        name, part_pieces, is_explicit = parsed
        pieces += part_pieces
        names |= {name} - {""}
        explicit |= is_explicit
    if len(names) > 1:
        return None
    return RealSet(names.pop() if names else "", tuple(pieces), explicit)


def _piece(text: str) -> tuple[str, list[Piece], bool] | None:
    """Return name, pieces and whether no other reading is possible."""
    match = _MEMBER.match(text)
    if match:
        inside = _piece(text[match.end() :])
        return inside and (match[1], inside[1], True)
    match = _INTERVAL.fullmatch(text)
    if match:
        ends = [end.strip() for end in re.split("[,;]", match[2])]
        if len(ends) != 2 or not all(ends):
            return None
        # `]1,2[` is the European spelling of (1,2).
        piece = Piece(*ends, match[1] == "[", match[3] == "]")
        # A point has neither a half-open bracket nor an infinite end.
        is_interval = match[1] + match[3] not in ("()", "[]") or "\\infty" in match[2]
        return "", [piece], is_interval
    match = _EXCEPT.fullmatch(text)
    if match:
        pieces = _all_but(match["points"])
        return pieces and ("", pieces, True)
    match = _NOT_EQUAL.fullmatch(text)
    if match:
        pieces = _all_but(match[2])
        return pieces and (match[1], pieces, True)
    match = _SIZE.fullmatch(text)
    if match:
        pieces = _of_size(match[2], match["end"])
        return pieces and (match["name"], pieces, True)
    return _inequalities(text)


def _in_words(match: re.Match) -> RealSet | None:
    """Read `x is greater than 2` or `at least 2`."""
    end, words = match["end"], match["words"]
    if _number(end) is None:
        return None
    is_negated = words.startswith("no")
    is_low = bool(re.search("greater|more|larger|at least", words)) != is_negated
    is_closed = is_negated or words.startswith("at ") or words.endswith("equal to")
    piece = Piece(end, _MOST, is_closed, False) if is_low else Piece(_LEAST, end, False, is_closed)
    return RealSet(match["name"] or "", (piece,), is_explicit=True)


def _of_size(relation: str, end: str) -> list[Piece] | None:
    """Return the numbers whose absolute value is below or above a positive number."""
    number = _number(end)
    if number is None or not 0 < number < float("inf"):
        return None
    is_closed, opposite = len(relation) > 1, f"-{end}"
    if relation in ("<", "\\le"):
        return [Piece(opposite, end, is_closed, is_closed)]
    return [Piece(_LEAST, opposite, False, is_closed), Piece(end, _MOST, is_closed, False)]


def _all_but(points: str) -> list[Piece] | None:
    """Return the real numbers except for one to three numbers."""
    points = re.sub(r"^\\?\{(.*?)\\?\}$", r"\1", points.strip())
    points = re.sub(rf"(?<=[ ,])(?:{_NAME}) ?\\ne ?", "", points)
    points = re.sub(r"\\pm ?([\d.]+)", r"\1, -\1", points)
    ends = [end.strip() for end in re.split(r",? and |[,;]", points)]
    values = [_number(end) for end in ends]
    if not 1 <= len(ends) <= 3 or None in values or len(set(values)) < len(values):
        return None
    ordered = [end for _, end in sorted(zip(values, ends, strict=True))]
    bounds = [_LEAST, *ordered, _MOST]
    return [Piece(low, high, False, False) for low, high in itertools.pairwise(bounds)]


def _inequalities(text: str) -> tuple[str, list[Piece], bool] | None:
    """Read `1 < x < 5`, or inequalities that hold together: `x > 1, x < 3`.

    No number fulfils `x < 1, x > 3`, so its comma is read as "or"; the word "and" is not.
    """
    whole = _inequality(text)
    read = [whole] if whole else [_inequality(part.strip()) for part in _BOTH.split(text)]
    if None in read or len(read) > 2 or len({name for name, _ in read}) > 1:
        return None
    name, first = read[0]
    if len(read) == 1:
        return name, [first], True
    both = _intersection(first, read[1][1])
    if both:
        return name, [both], True
    is_and = " and " in text or "\\land" in text or "\\wedge" in text
    if both is None:
        return None
    return name, [] if is_and else [first, read[1][1]], True


def _inequality(text: str) -> tuple[str, Piece] | None:
    sides = _RELATION.split(text)
    if len(sides) == 3:
        left, relation, right = sides
        if _VARIABLE.fullmatch(left):
            left, relation, right = right, _MIRRORED[relation], left
        sides = [left, relation, right, relation, ""]
    if len(sides) != 5 or not _VARIABLE.fullmatch(sides[2]):
        return None
    low, opens, name, closes, high = sides
    falls = opens in (">", "\\ge")
    if falls != (closes in (">", "\\ge")) or not (low or high):
        return None
    if falls:
        low, opens, closes, high = high, closes, opens, low
    if any(re.search(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", end) for end in (low, high)):
        return None
    if any(re.search(r"[,;=]| and | or ", end) and _number(end) is None for end in (low, high)):
        return None
    low_closed = bool(low) and len(opens) > 1 and low != _LEAST
    high_closed = bool(high) and len(closes) > 1 and high != _MOST
    return name, Piece(low or _LEAST, high or _MOST, low_closed, high_closed)


def _intersection(first: Piece, second: Piece) -> Piece | bool | None:
    """Return the intersection of two pieces, False if empty, None if an end is not a number."""
    keys = [_key(piece) for piece in (first, second)]
    if None in keys:
        return None
    by_low = max((first, second), key=lambda p: (_number(p.low), not p.low_closed))
    by_high = min((first, second), key=lambda p: (_number(p.high), p.high_closed))
    low, high = _number(by_low.low), _number(by_high.high)
    if low > high or (low == high and not (by_low.low_closed and by_high.high_closed)):
        return False
    return Piece(by_low.low, by_high.high, by_low.low_closed, by_high.high_closed)


def _merged(pieces: tuple[Piece, ...]) -> list[Piece]:
    """Join pieces that overlap or touch, if all ends are numbers."""
    if len(pieces) < 2 or any(_key(piece) is None for piece in pieces):
        return list(pieces)
    ordered = sorted(pieces, key=_key)
    merged = [ordered[0]]
    for piece in ordered[1:]:
        last = merged[-1]
        end, start = _number(last.high), _number(piece.low)
        if start > end or (start == end and not (last.high_closed or piece.low_closed)):
            merged.append(piece)
        elif (_number(piece.high), piece.high_closed) > (end, last.high_closed):
            merged[-1] = dataclasses.replace(last, high=piece.high, high_closed=piece.high_closed)
    return merged


def _key(piece: Piece) -> tuple | None:
    low, high = _number(piece.low), _number(piece.high)
    return None if low is None or high is None else (low, not piece.low_closed, high)


def _number(text: str) -> Fraction | float | None:
    text = text.strip()
    if text in ("\\infty", "+\\infty", "-\\infty", "- \\infty"):
        return float("-inf" if text.startswith("-") else "inf")
    quantity = quantities.parse(text)
    return quantity.value if quantity and quantity.unit is None else None
