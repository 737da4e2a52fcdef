"""Cut a cleaned answer into its parts: lists, tuples, intervals, sets, numbered items."""

import dataclasses
import re

from prism_jax.rewards import notation

_NUMBERED = re.compile(
    r"(?:^|(?<=[\s,;.]))(?:\((?:\d|[a-h]|i{1,3}|iv|v)\)|[1-9a-h]\))\s*(?=\S)"
    r"|(?:^|(?<=\n))[1-9]\. (?=\S)|(?<=\d)\([1-9]\)(?=\S)"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_SPACED = re.compile(r"[-+]?\d+(?:\.\d+)?(?: [-+]?\d+(?:\.\d+)?)+")
_AND = re.compile(r"\sand\s", re.IGNORECASE)
_CONJUNCTION = re.compile(r",?\s+(?:and|&)\s+|\s*\n+\s*", re.IGNORECASE)
_ALTERNATIVE = re.compile(r",?\s+(?:or|\\(?:text|mbox)\{\s*or\s*\})\s+", re.IGNORECASE)
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])\s*|\+/-\s*|\+-\s*")


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of an answer, two or more, and whether their order counts.

    `brackets` are the outer ones, "" for a bare list. The brackets of an interval or a tuple
    count: [0, 1) is not (0, 1).
    is_numbered: the parts are numbered. is_conjunction: all parts are joined by "and".
    """

    items: tuple[str, ...]
    brackets: str
    ordered: bool
    is_numbered: bool = False
    is_conjunction: bool = False


def readings(text: str) -> list[Parts]:
    """Return the ways to read a text as parts; none if it is a single value.

    There are two if a comma may separate thousands (`1,234`) or numbers (1 and 234); the caller
    handles the reading as a single number.
    """
    bare_lists = []
    for parts in (_numbered(text), _bracketed(text), _plus_minus(text)):
        if parts is not None:
            return [parts]
    for protect in (True, False):
        bare = _bare_list(text, protect_thousands=protect)
        if bare is not None and bare not in bare_lists:
            bare_lists.append(bare)
    return bare_lists


def is_single(text: str) -> bool:
    """Return whether a text may be a single value, if its commas may separate thousands."""
    if any(read(text) is not None for read in (_numbered, _bracketed, _plus_minus)):
        return False
    return _bare_list(text, protect_thousands=True) is None


def _numbered(text: str) -> Parts | None:
    marks = list(_NUMBERED.finditer(text))
    if len(marks) < 2 or marks[0].start() > 0:
        return None
    if [mark.group()[:2] for mark in marks][:2] != ["(1", "(2"]:
        # These marks are not a numbering: `2(3)` is a product.
        marks = [mark for mark in marks if not text[: mark.start()][-1:].isdigit()]
    stops = [mark.start() for mark in marks[1:]] + [len(text)]
    items = tuple(
        re.sub(r"[\s,;.]*(?:\band)?\s*$", "", text[mark.end() : stop])
        for mark, stop in zip(marks, stops, strict=True)
    )
    return Parts(items, "", ordered=True, is_numbered=True) if all(items) else None


def _bracketed(text: str) -> Parts | None:
    inner, brackets = unwrap(text)
    if not brackets:
        return None
    items = _split(inner, {";"})
    if len(items) < 2:
        items = _split(inner, {","})
    if len(items) < 2:
        return None
    return Parts(items, brackets, ordered=brackets != "{}")


def unwrap(text: str) -> tuple[str, str]:
    """Return the inside and the two outer brackets; the text and "" if there are none."""
    if text.startswith("\\{") and text.endswith("\\}"):
        text = text[1:-2] + "}"
    if len(text) < 2 or text[0] not in "([{<":
        return text, ""
    if text[0] == "<":
        return (text[1:-1], "()") if text.endswith(">") and "<" not in text[1:] else (text, "")
    if notation.closing(text, 0) != len(text) - 1:
        return text, ""
    return text[1:-1].strip(), text[0] + text[-1]


def _plus_minus(text: str) -> Parts | None:
    if len(_PLUS_MINUS.findall(text)) != 1 or re.search("[,;]| or | and ", text):
        return None
    upper, lower = _PLUS_MINUS.sub("+", text), _PLUS_MINUS.sub("-", text)
    upper = re.sub(r"(^|[({=]\s*)\+", r"\1", upper)
    return Parts((upper.strip(), lower.strip()), "{}", ordered=False)


def _bare_list(text: str, *, protect_thousands: bool) -> Parts | None:
    masked = text.replace(" ", ";") if _SPACED.fullmatch(text) else text
    if protect_thousands:
        masked = _THOUSANDS.sub(lambda match: match.group().replace(",", "\0"), masked)
    alternative = bool(_ALTERNATIVE.search(masked))
    masked = re.sub("^either " if alternative else "^both ", "", masked)
    masked = _CONJUNCTION.sub(";", _ALTERNATIVE.sub(";", masked))
    items = _split(masked, {",", ";"})
    if len(items) < 2:
        return None
    is_conjunction = len(_AND.findall(text)) == len(items) - 1
    items = tuple(item.replace("\0", ",") for item in items)
    return Parts(items, "", ordered=not alternative, is_conjunction=is_conjunction)


def _split(text: str, separators: set[str]) -> tuple[str, ...]:
    """Split at the separators that lie outside all brackets; empty parts are dropped."""
    items, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
        elif character in separators and depth == 0:
            items.append(text[start:index])
            start = index + 1
    items.append(text[start:])
    return tuple(item.strip() for item in items if item.strip())
