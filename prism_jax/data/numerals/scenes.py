"""The scenes of `numerals` pictures: grids of marks and bar charts.

A scene holds only the subjects of questions (digits, colours, bar heights); the positions of
strokes and the samples of handwriting are picked when it is drawn. A misread scene is a scene too,
so a demonstration that slips in perception reasons correctly about a slightly different picture.
"""

import dataclasses
import hashlib
import random

# Colour words of the papers, and the inks that stay readable on each.
_DARK_INKS = ("black", "blue", "red", "green")
_LIGHT_INKS = ("white", "yellow", "pink", "cyan")
INKS_ON_PAPER = {
    "white": _DARK_INKS,
    "cream": _DARK_INKS,
    "grey": _DARK_INKS,
    "black": _LIGHT_INKS,
}
# Without the circle, which could be read as a zero.
SHAPES = ("diamond", "square", "triangle", "cross")
# Without letters that could be read as digits (B I L O Q S Z).
LETTERS = ("A", "E", "H", "K", "M", "T", "W", "X")
BAR_COLOURS = ("blue", "red", "green")
# Highest value of a chart's axis -> distance of its lines.
_AXES = {10: 2, 20: 5}
# Handwritten digit -> the digit that a hasty reader reads.
CONFUSIONS = {0: 6, 1: 7, 2: 3, 3: 8, 4: 9, 5: 6, 6: 0, 7: 1, 8: 3, 9: 4}
# The digit that is misread by habit rather than by accident.
HABITUALLY_MISREAD = 9
_TEST_SHARE_OF_256 = 51


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """A cell of a grid."""

    kind: str  # "digit", "letter" or "shape"
    name: str  # "7", "K", "square"
    ink: str  # colour word


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows of marks on paper; all rows have the same number of marks."""

    paper: str
    rows: tuple[tuple[Mark, ...], ...]

    @property
    def marks(self) -> tuple[Mark, ...]:
        """Return all marks, row after row."""
        return tuple(mark for row in self.rows for mark in row)

    @property
    def has_one_ink(self) -> bool:
        """Return whether all marks have the same colour."""
        return len({mark.ink for mark in self.marks}) == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a chart."""

    label: str  # "A", "B", ...
    value: int  # 1 .. the axis' top
    colour: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """Labelled bars over an axis from 0 to `top` with a line every `tick`."""

    paper: str
    bars: tuple[Bar, ...]
    top: int
    tick: int


Scene = Grid | Chart


def belongs_to_test(key: str) -> bool:
    """Return whether the hash puts a digit sample or a chart in the test split (51 of 256)."""
    return hashlib.sha256(key.encode()).digest()[0] < _TEST_SHARE_OF_256


def digits_of(marks: tuple[Mark, ...]) -> tuple[int, ...]:
    """Return the values of the digits among the marks, in order."""
    return tuple(int(mark.name) for mark in marks if mark.kind == "digit")


def random_grid(
    rng: random.Random,
    *,
    layouts: tuple[tuple[int, int], ...],
    has_one_ink: bool,
    distractor_share: float,
) -> Grid:
    """Return a random grid: paper, size, inks, digits, and letters or shapes in some cells."""
    num_rows, num_columns = rng.choice(layouts)
    paper = rng.choice(tuple(INKS_ON_PAPER))
    num_inks = 1 if has_one_ink else rng.choice((1, 2, 2, 3))
    inks = rng.sample(INKS_ON_PAPER[paper], num_inks)

    def mark() -> Mark:
        ink = rng.choice(inks)
        if rng.random() < distractor_share:
            if rng.random() < 0.5:
                return Mark(kind="letter", name=rng.choice(LETTERS), ink=ink)
            return Mark(kind="shape", name=rng.choice(SHAPES), ink=ink)
        return Mark(kind="digit", name=str(rng.randrange(10)), ink=ink)

    rows = tuple(tuple(mark() for _ in range(num_columns)) for _ in range(num_rows))
    return Grid(paper=paper, rows=rows)


def random_chart(rng: random.Random, *, is_test: bool) -> Chart:
    """Return a random chart of 3 to 6 bars whose values and colours belong to the split."""
    while True:
        top = rng.choice(tuple(_AXES))
        num_colours = rng.choice((1, 2, 2, 3))
        colours = rng.sample(BAR_COLOURS, num_colours)
        bars = tuple(
            Bar(label=label, value=rng.randint(1, top), colour=rng.choice(colours))
            for label in "ABCDEF"[: rng.randint(3, 6)]
        )
        key = " ".join(f"{bar.label}{bar.value}{bar.colour}" for bar in bars)
        if belongs_to_test(key) == is_test:
            paper = rng.choice(("white", "cream", "grey"))
            return Chart(paper=paper, bars=bars, top=top, tick=_AXES[top])


def misread(scene: Scene, rng: random.Random, *, rate: float, habit_rate: float) -> Scene:
    """Return the scene as a hasty reader sees it: each digit or bar is misread at `rate`.

    A digit is replaced by a similar digit (`CONFUSIONS`), a 9 at `habit_rate` instead of `rate`; a
    bar is read one too high or one too low within the axis.
    """
    if isinstance(scene, Chart):
        bars = []
        for bar in scene.bars:
            near = [v for v in (bar.value - 1, bar.value + 1) if 1 <= v <= scene.top]
            is_misread = rng.random() < rate
            value = rng.choice(near) if is_misread else bar.value
            bars.append(dataclasses.replace(bar, value=value))
        return dataclasses.replace(scene, bars=tuple(bars))

    def seen(mark: Mark) -> Mark:
        if mark.kind != "digit":
            return mark
        digit = int(mark.name)
        if rng.random() >= (habit_rate if digit == HABITUALLY_MISREAD else rate):
            return mark
        return dataclasses.replace(mark, name=str(CONFUSIONS[digit]))

    return dataclasses.replace(
        scene, rows=tuple(tuple(seen(mark) for mark in row) for row in scene.rows)
    )
