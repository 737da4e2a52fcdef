"""Read matrices and determinants: `pmatrix`, `array` in brackets, `A = ...`, `[[1,2],[3,4]]`."""

import itertools
import re
from collections.abc import Callable
from fractions import Fraction

from prism_jax.rewards import quantities

_KINDS = "(?:[pbBvV]|small)?matrix|array"
_MATRIX = re.compile(
    r"(?:(?P<name>(?:[A-Za-z]|\\[A-Za-z]{2,8}(?: ?\{?[A-Za-z]\}?)?)(?:[\^_]\{?[-\w]{1,3}\}?)?)"
    r" ?= ?)?"
    r"(?P<left>[(\[|]|\\[{|])? ?"
    rf"\\begin\{{(?P<kind>{_KINDS})\*?\}}(?P<cells>.*?)\\end\{{(?P=kind)\*?\}} ?"
    r"(?P<right>[)\]|]|\\[}|])?(?: ?\^ ?\{?(?P<power>T|\\top)\}?)?",
    re.DOTALL,
)
_COLUMNS = re.compile(r" ?(?:\[[a-z]\] ?)?\{[lcr| ]{0,40}\}")
_ROW_END = re.compile(r"\\\\(?: ?\[[^\[\]]{1,12}\])?|\\cr(?![A-Za-z])")
_LINE = re.compile(r"\\hline")
_MAX_DETERMINANT = 4

Rows = list[list[str]]
Same = Callable[[str, str], bool]


def same(answer: str, truth: str, compare: Same) -> bool | None:
    """Compare two texts, of which at least one is a matrix in LaTeX; None if neither is."""
    given, wanted = _parse(answer), _parse(truth)
    if given is None and wanted is None:
        return None
    if None in (given, wanted) and "\\begin" in answer and "\\begin" in truth:
        return None  # a product or a sum with matrices
    if given and wanted and (given[0] != wanted[0] != "" != given[0]):
        return False  # two names
    is_determinant = [side is not None and side[1] for side in (given, wanted)]
    if any(is_determinant):
        values = [
            _determinant(side[2]) if is_one else text
            for side, is_one, text in zip(
                (given, wanted), is_determinant, (answer, truth), strict=True
            )
        ]
        return None not in values and compare(*values)
    rows = [
        _nested(text) if side is None else side[2]
        for side, text in ((given, answer), (wanted, truth))
    ]
    if None in rows:
        return False
    shapes = [[len(row) for row in side] for side in rows]
    return shapes[0] == shapes[1] and all(
        compare(one, other)
        for one, other in zip(itertools.chain(*rows[0]), itertools.chain(*rows[1]), strict=True)
    )


def _parse(text: str) -> tuple[str, bool, Rows] | None:
    """Return the name, whether it is a determinant, and the cells."""
    if "\\begin" not in text:
        return None
    while len(text) > 2 and text[0] + text[-1] in ("()", "{}") and "\\begin" in text[1:9]:
        text = text[1:-1].strip()
    match = _MATRIX.fullmatch(text)
    if match is None:
        return None
    left, right = (match["left"] or "").strip("\\"), (match["right"] or "").strip("\\")
    if left + right not in ("", "()", "[]", "{}", "||"):
        return None
    cells = match["cells"]
    if match["kind"] == "array":
        cells = _COLUMNS.sub("", cells, count=1)
    rows = [
        [cell.strip() for cell in row.split("&")]
        for row in _ROW_END.split(_LINE.sub("", cells))
        if row.strip()
    ]
    if not rows or len({len(row) for row in rows}) > 1:
        return None
    if match["power"]:
        rows = [list(column) for column in zip(*rows, strict=True)]
    is_determinant = match["kind"][0] in "vV" or left == "|"
    return match["name"] or "", is_determinant, rows


def _nested(text: str) -> Rows | None:
    """Read `[[1,2],[3,4]]` or `((1,2),(3,4))`."""
    text = re.sub(r"^[A-Za-z] ?= ?", "", text)
    if not re.fullmatch(r"\[ ?\[.*\] ?\]|\( ?\(.*\) ?\)", text, re.DOTALL):
        return None
    inner = text[1:-1].strip()[1:-1]
    rows = re.split(r"[)\]] ?[,;] ?[(\[]", inner)
    cells = [[cell.strip() for cell in row.split(",")] for row in rows]
    return cells if len({len(row) for row in cells}) == 1 else None


def _determinant(rows: Rows) -> str | None:
    """Return the determinant as text, None if the cells are not numbers."""
    size = len(rows)
    if size > _MAX_DETERMINANT or any(len(row) != size for row in rows):
        return None
    numbers = [[quantities.parse(cell) for cell in row] for row in rows]
    if any(number is None or number.unit for row in numbers for number in row):
        return None
    total = Fraction(0)
    for order in itertools.permutations(range(size)):
        swaps = sum(a > b for a, b in itertools.combinations(order, 2))
        product = Fraction((-1) ** swaps)
        for row, column in enumerate(order):
            product *= numbers[row][column].value
        total += product
    return str(total)
