"""Demonstrations over `numerals` questions: the teacher's, the public ones, and untagged ones.

The teacher's caption covers the whole picture, its reasoning goes step by step, and it is always
right. A public demonstration is terse and slips: it misreads digits or bars and miscalculates at
stated rates, by accident or by habit, and reasons consistently with these mistakes. Accidents
average out over many demonstrations; habits, which occur in most of them, are learned and must be
unlearned. An untagged demonstration is right but not in the response format. A base model is
trained on terse and detailed untagged demonstrations, so that it can produce both kinds.
"""

import dataclasses
import random

from prism_jax.data.numerals import questions as numerals_questions
from prism_jax.data.numerals import scenes as numerals_scenes

_CAPTION_END = "</caption>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A response and the mistakes in it."""

    response: str
    answer: str
    is_misread: bool
    num_arithmetic_slips: int


def response_text(*, caption: str, think: str, answer: str) -> str:
    """Return the three parts in their tags, in the layout of the system prompt."""
    return (
        f"<caption>\n{caption}\n{_CAPTION_END}\n"
        f"<think>\n{think}\n</think>\n<answer>\n{answer}\n</answer>"
    )


def split_segments(response: str) -> tuple[str, str]:
    """Return the caption segment, its closing tag included, and the rest, the cot segment.

    Their concatenation is the response.
    """
    end = response.index(_CAPTION_END) + len(_CAPTION_END)
    return response[:end], response[end:]


def _mark_name(mark: numerals_scenes.Mark, *, names_ink: bool) -> str:
    return f"{mark.ink} {mark.name}" if names_ink else mark.name


def _row_lines(grid: numerals_scenes.Grid) -> list[str]:
    """Return a line per row, with colours if they differ."""
    names_ink = not grid.has_one_ink
    return [
        f"- Row {r + 1}: "
        + numerals_questions.listed(_mark_name(mark, names_ink=names_ink) for mark in row)
        + "."
        for r, row in enumerate(grid.rows)
    ]


def _bars_line(chart: numerals_scenes.Chart) -> str:
    names_colour = len({bar.colour for bar in chart.bars}) > 1
    names = (
        f"{bar.colour} {bar.label} {bar.value}" if names_colour else f"{bar.label} {bar.value}"
        for bar in chart.bars
    )
    return f"- Bars: {numerals_questions.listed(names)}."


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def detailed_caption(scene: numerals_scenes.Scene) -> str:
    """Return the teacher's caption: style, layout or axis, and all marks or bars."""
    if isinstance(scene, numerals_scenes.Chart):
        colours = sorted({bar.colour for bar in scene.bars})
        return "\n".join(
            (
                f"- Style: bar chart on {scene.paper} paper.",
                f"- Axis: 0 to {scene.top}, a line every {scene.tick}.",
                f"- Layout: {len(scene.bars)} bars in {' and '.join(colours)}.",
                _bars_line(scene),
            )
        )
    inks = " and ".join(sorted({mark.ink for mark in scene.marks}))
    rows, columns = len(scene.rows), len(scene.rows[0])
    return "\n".join(
        (
            f"- Style: handwritten digits in {inks} on {scene.paper} paper.",
            f"- Layout: {_counted(rows, 'row')} of {columns}.",
            *_row_lines(scene),
        )
    )


def short_caption(scene: numerals_scenes.Scene) -> str:
    """Return a public caption: the marks or bars alone."""
    if isinstance(scene, numerals_scenes.Chart):
        return _bars_line(scene)
    return "\n".join(_row_lines(scene))


def teacher(scene: numerals_scenes.Scene, question: numerals_questions.Question) -> Demonstration:
    """Return the detailed demonstration; its answer is the ground truth."""
    work = question.work(scene, numerals_questions.exact())
    return Demonstration(
        response=response_text(
            caption=detailed_caption(scene), think="\n".join(work.steps), answer=work.answer
        ),
        answer=work.answer,
        is_misread=False,
        num_arithmetic_slips=0,
    )


def public(
    scene: numerals_scenes.Scene,
    question: numerals_questions.Question,
    rng: random.Random,
    *,
    perception_rate: float,
    arithmetic_rate: float,
    habit_rate: float,
) -> Demonstration:
    """Return a terse demonstration, with accidents at the first two rates, habits at the third."""
    seen = numerals_scenes.misread(scene, rng, rate=perception_rate, habit_rate=habit_rate)
    arithmetic = numerals_questions.Arithmetic(rng, rate=arithmetic_rate, habit_rate=habit_rate)
    work = question.work(seen, arithmetic)
    return Demonstration(
        response=response_text(caption=short_caption(seen), think=work.terse, answer=work.answer),
        answer=work.answer,
        is_misread=seen != scene,
        num_arithmetic_slips=arithmetic.num_slips,
    )


def untagged(
    scene: numerals_scenes.Scene, question: numerals_questions.Question, *, is_detailed: bool
) -> Demonstration:
    """Return a right response without tags, terse or as detailed as the teacher's."""
    work = question.work(scene, numerals_questions.exact())
    caption = detailed_caption(scene) if is_detailed else short_caption(scene)
    reasoning = "\n".join(work.steps) if is_detailed else work.terse
    return Demonstration(
        response=f"{caption}\n{reasoning}\nThe answer is {work.answer}.",
        answer=work.answer,
        is_misread=False,
        num_arithmetic_slips=0,
    )
