"""Examples of the `numerals` corpus: a scene, a question and its demonstrations, at a level.

An example depends on (level, seed, stream, index) alone: the number of rows, the slip rates and
the drawing of pictures do not change the other examples.
"""

import dataclasses
import functools
import random
from collections.abc import Callable

from PIL import Image

from prism_jax import errors
from prism_jax.data.numerals import chart_questions as numerals_chart_questions
from prism_jax.data.numerals import demonstrations as numerals_demonstrations
from prism_jax.data.numerals import pictures as numerals_pictures
from prism_jax.data.numerals import questions as numerals_questions
from prism_jax.data.numerals import scenes as numerals_scenes

_Ask = Callable[[numerals_scenes.Scene, random.Random], numerals_questions.Question | None]

# The parts of the corpus. Only rl_test shows test handwriting and test charts.
STREAMS = ("base", "public", "teacher", "align", "rl_train", "rl_test")
_TEST_STREAM = "rl_test"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The number of examples in each part."""

    base: int
    public: int
    teacher: int
    align: int
    rl_train: int
    rl_test: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slips:
    """Rates of mistakes in public demonstrations, each in [0, 1]."""

    perception: float  # of misreading, per digit or bar
    arithmetic: float  # of a wrong result, per addition, count or choice
    habit: float  # of a 9 read as 4, a carry lost, a zero taken for odd, where there is one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """A level: the form of its examples, and the default numbers of rows and rates of slips."""

    name: str
    layouts: tuple[tuple[int, int], ...]  # rows and columns of a grid
    cell_pixels: tuple[int, int]  # least and greatest side of a cell
    has_one_ink: bool
    distractor_share: float  # of the cells of a grid
    chart_share: float  # of the examples
    choice_share: float  # of the questions with a number as answer
    grid_questions: tuple[_Ask, ...]
    chart_questions: tuple[_Ask, ...]
    rows: Rows
    slips: Slips


TINY = Level(
    name="tiny",
    layouts=((1, 2), (1, 3), (2, 2)),
    cell_pixels=(32, 32),
    has_one_ink=True,
    distractor_share=0.0,
    chart_share=0.0,
    choice_share=0.0,
    grid_questions=(
        numerals_questions.read_row,
        numerals_questions.pair_sum,
        numerals_questions.largest_digit,
        numerals_questions.count_even,
    ),
    chart_questions=(),
    rows=Rows(base=0, public=6000, teacher=600, align=2000, rl_train=2000, rl_test=500),
    slips=Slips(perception=0.05, arithmetic=0.05, habit=0.65),
)

SMALL = Level(
    name="small",
    layouts=((1, 4), (2, 2), (2, 3), (2, 4), (3, 3), (3, 4)),
    cell_pixels=(56, 80),
    has_one_ink=False,
    distractor_share=0.15,
    chart_share=0.35,
    choice_share=0.25,
    grid_questions=(
        numerals_questions.read_row,
        numerals_questions.row_sum,
        numerals_questions.column_sum,
        numerals_questions.largest_digit,
        numerals_questions.count_even,
        numerals_questions.sum_of_even,
        numerals_questions.row_difference,
        numerals_questions.ink_compare,
        numerals_questions.largest_times_smallest,
    ),
    chart_questions=(
        numerals_chart_questions.tallest_value,
        numerals_chart_questions.tallest_label,
        numerals_chart_questions.count_above,
        numerals_chart_questions.bar_sum,
        numerals_chart_questions.bar_difference,
        numerals_chart_questions.colour_compare,
    ),
    rows=Rows(base=0, public=20000, teacher=2000, align=4000, rl_train=4000, rl_test=1000),
    slips=Slips(perception=0.05, arithmetic=0.05, habit=0.65),
)
_LEVELS = (TINY, SMALL)


def level_named(name: str) -> Level:
    """Return the level with a name; InputError for an unknown name."""
    for level in _LEVELS:
        if level.name == name:
            return level
    known = ", ".join(level.name for level in _LEVELS)
    raise errors.InputError(f"numerals level must be one of {known}, got {name!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """An example, whose picture is not drawn yet."""

    level: Level
    seed: int
    stream: str
    index: int
    scene: numerals_scenes.Scene
    question: numerals_questions.Question

    @property
    def is_test(self) -> bool:
        """Return whether the example shows test handwriting."""
        return self.stream == _TEST_STREAM

    @functools.cached_property
    def teacher(self) -> numerals_demonstrations.Demonstration:
        """Return the teacher's demonstration; its answer is the ground truth."""
        return numerals_demonstrations.teacher(self.scene, self.question)

    def _rng(self, purpose: str) -> random.Random:
        return _rng(self.level, self.seed, self.stream, self.index, purpose)

    def public(self, slips: Slips) -> numerals_demonstrations.Demonstration:
        """Return the public demonstration at these slip rates."""
        return numerals_demonstrations.public(
            self.scene,
            self.question,
            self._rng("slips"),
            perception_rate=slips.perception,
            arithmetic_rate=slips.arithmetic,
            habit_rate=slips.habit,
        )

    def untagged(self, *, is_detailed: bool) -> numerals_demonstrations.Demonstration:
        """Return a base model's demonstration."""
        return numerals_demonstrations.untagged(self.scene, self.question, is_detailed=is_detailed)

    def picture(self) -> Image.Image:
        """Draw the scene with the handwriting of the example's split."""
        if isinstance(self.scene, numerals_scenes.Chart):
            return numerals_pictures.draw_chart(self.scene, self._rng("picture"))
        return numerals_pictures.draw_grid(
            self.scene,
            self._rng("picture"),
            cell_pixels=self.level.cell_pixels,
            is_test=self.is_test,
        )


def _rng(level: Level, seed: int, stream: str, index: int, purpose: str) -> random.Random:
    return random.Random(f"numerals {level.name} {seed} {stream} {index} {purpose}")


def example(*, level: Level, seed: int, stream: str, index: int) -> Example:
    """Return an example: a random question, and a random scene that suits it."""
    assert stream in STREAMS, f"{stream} is not a part of the corpus"
    rng = _rng(level, seed, stream, index, "scene")
    shows_chart = rng.random() < level.chart_share
    ask = rng.choice(level.chart_questions if shows_chart else level.grid_questions)
    question = None
    while question is None:
        if shows_chart:
            scene = numerals_scenes.random_chart(rng, is_test=stream == _TEST_STREAM)
        else:
            scene = numerals_scenes.random_grid(
                rng,
                layouts=level.layouts,
                has_one_ink=level.has_one_ink,
                distractor_share=level.distractor_share,
            )
        question = ask(scene, rng)
    has_number = question.work(scene, numerals_questions.exact()).answer.isdecimal()
    if has_number and rng.random() < level.choice_share:
        question = numerals_questions.as_choice(question, scene, rng)
    return Example(
        level=level, seed=seed, stream=stream, index=index, scene=scene, question=question
    )
