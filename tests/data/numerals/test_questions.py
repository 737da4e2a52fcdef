"""Answers by rule: recomputed here from the teacher's text and the question alone."""

import random
import re

import pytest

from prism_jax.data import prompts
from prism_jax.data.numerals import chart_questions as numerals_chart_questions
from prism_jax.data.numerals import corpus as numerals_corpus
from prism_jax.data.numerals import demonstrations as numerals_demonstrations
from prism_jax.data.numerals import examples as numerals_examples
from prism_jax.data.numerals import questions as numerals_questions
from prism_jax.data.numerals import scenes as numerals_scenes

_NUM_CHECKED = 1200


def _grid(*rows: str) -> numerals_scenes.Grid:
    """Make a grid from rows such as "r4 b7 rsquare": colour letter and name."""
    inks = {"r": "red", "b": "blue"}

    def mark(word):
        kind = "digit" if word[1:].isdigit() else "shape"
        return numerals_scenes.Mark(kind=kind, name=word[1:], ink=inks[word[0]])

    return numerals_scenes.Grid(
        paper="white", rows=tuple(tuple(map(mark, row.split())) for row in rows)
    )


def _chart(*bars: tuple[str, int, str]) -> numerals_scenes.Chart:
    made = tuple(numerals_scenes.Bar(label=a, value=b, colour=c) for a, b, c in bars)
    return numerals_scenes.Chart(paper="white", bars=made, top=20, tick=5)


_GRID = _grid("r4 b7 rsquare", "b2 r0 r9")
_CHART = _chart(("A", 7, "red"), ("B", 16, "blue"), ("C", 10, "red"))


@pytest.mark.parametrize(
    ("ask", "scene", "expected"),
    [
        (numerals_questions.read_row, _GRID, {"row 1": "47", "row 2": "209"}),
        (numerals_questions.row_sum, _GRID, {"row 1": "11", "row 2": "11"}),
        (numerals_questions.pair_sum, _grid("r4 b9"), {"the row": "13"}),
        (numerals_questions.column_sum, _GRID, {"column 1": "6", "column 2": "7"}),
        (numerals_questions.largest_digit, _GRID, {"": "9"}),
        (numerals_questions.count_even, _GRID, {"": "3"}),
        (numerals_questions.sum_of_even, _GRID, {"": "6"}),
        (numerals_questions.row_difference, _grid("r4 b7", "b2 r1"), {"": "8"}),
        # red: 4 + 0 + 9 = 13, blue: 7 + 2 = 9
        (numerals_questions.ink_compare, _GRID, {"": "red"}),
        (numerals_questions.largest_times_smallest, _grid("r4 b7 b3"), {"": "21"}),
        (numerals_chart_questions.tallest_value, _CHART, {"": "16"}),
        (numerals_chart_questions.tallest_label, _CHART, {"": "B"}),
        (
            numerals_chart_questions.count_above,
            _CHART,
            {"above 5": "3", "above 10": "1", "above 15": "1"},
        ),
        (numerals_chart_questions.bar_sum, _CHART, {"A and bar B": "23", "A and bar C": "17"}),
        (numerals_chart_questions.bar_difference, _CHART, {"A and bar B": "9", "A and bar C": "3"}),
        # red: 7 + 10 = 17, blue: 16
        (numerals_chart_questions.colour_compare, _CHART, {"": "red"}),
    ],
)
def test_each_question_has_the_answer_worked_out_by_hand(ask, scene, expected):
    met = set()
    for seed in range(60):
        question = ask(scene, random.Random(seed))
        for part, answer in expected.items():
            if question is not None and part in question.text:
                assert question.work(scene, numerals_questions.exact()).answer == answer
                met.add(part)
    assert met == set(expected)


@pytest.mark.parametrize(
    ("ask", "scene"),
    [
        (numerals_questions.read_row, _grid("r0 b7")),
        (numerals_questions.row_sum, _grid("r4 rsquare")),
        (numerals_questions.pair_sum, _grid("r4 b7 b1")),
        (numerals_questions.sum_of_even, _grid("r4 b7 b1")),
        (numerals_questions.ink_compare, _grid("r4 b4")),
        (numerals_questions.ink_compare, _grid("r4 r7")),
        (numerals_questions.row_difference, _grid("r4 r7", "rsquare bsquare")),
        (numerals_questions.largest_times_smallest, _grid("r0 b7")),
        (numerals_chart_questions.tallest_label, _chart(("A", 7, "red"), ("B", 7, "blue"))),
        (numerals_chart_questions.colour_compare, _chart(("A", 7, "red"), ("B", 7, "blue"))),
    ],
)
def test_a_scene_that_does_not_suit_a_question_is_refused(ask, scene):
    assert all(ask(scene, random.Random(seed)) is None for seed in range(20))


def _told_in_caption(
    caption: str,
) -> tuple[list[list[tuple[str, int]]], list[tuple[str, str, int]]]:
    """Read the rows of (ink, digit) and the bars (colour, label, value) out of a caption."""
    style = re.search(r"digits in ([a-z ]+) on", caption)
    one_ink = style.group(1) if style else ""
    rows = []
    for line in re.findall(r"^- Row \d+: (.*)\.$", caption, re.MULTILINE):
        words = [mark.split() for mark in line.split(", ")]
        rows.append(
            [
                (word[0] if len(word) == 2 else one_ink, int(word[-1]))
                for word in words
                if word[-1].isdigit()
            ]
        )
    bars = []
    one_colour = re.search(r"bars in ([a-z ]+)\.", caption)
    for line in re.findall(r"^- Bars: (.*)\.$", caption, re.MULTILINE):
        for bar in line.split(", "):
            *colour, label, value = bar.split()
            bars.append((colour[0] if colour else one_colour.group(1), label, int(value)))
    return rows, bars


def _recomputed(kind: str, text: str, caption: str) -> str:
    rows, bars = _told_in_caption(caption)
    flat = [digit for row in rows for _, digit in row]
    heights = {label: value for _, label, value in bars}
    numbers = [int(number) for number in re.findall(r"\d+", text.split("\n", maxsplit=1)[0])]
    evens = [digit for digit in flat if digit % 2 == 0]
    row = [digit for _, digit in rows[numbers[0] - 1 if numbers else 0]] if rows else []
    match kind:
        case "read_row":
            return "".join(map(str, row))
        case "row_sum":
            return str(sum(row))
        case "largest_digit":
            return str(max(flat))
        case "count_even":
            return str(len(evens))
        case "sum_of_even":
            return str(sum(evens))
        case "row_difference":
            a, b = (sum(digit for _, digit in rows[number - 1]) for number in numbers)
            return str(abs(a - b))
        case "largest_times_smallest":
            return str(max(flat) * min(flat))
        case "tallest_value":
            return str(max(heights.values()))
        case "tallest_label":
            return max(heights, key=heights.get)
        case "count_above":
            return str(sum(value > numbers[0] for value in heights.values()))
        case "bar_sum" | "bar_difference":
            a, b = (heights[label] for label in re.findall(r"bar ([A-F])", text))
            return str(a + b if kind == "bar_sum" else abs(a - b))
        case "ink_compare" | "colour_compare":
            pairs = [mark for row in rows for mark in row] + [(c, v) for c, _, v in bars]
            names = re.findall(r"the (\w+) or the (\w+) ones", text)[0]
            return max(names, key=lambda name: sum(v for c, v in pairs if c == name))
    raise AssertionError(f"no rule for {kind}")


@pytest.mark.parametrize("level", ["tiny", "small"])
def test_the_ground_truth_follows_from_the_teachers_caption_and_the_question(level):
    checked = 0
    for example in numerals_corpus.stream(level=level, seed=5, name="rl_train", rows=_NUM_CHECKED):
        kind = example.question.type.removesuffix("_choice")
        # A distractor leaves no trace of its column in the digits told; the table test has columns.
        if kind == "column_sum":
            continue
        caption, _ = numerals_demonstrations.split_segments(example.teacher.response)
        truth = _recomputed(kind, example.question.text, caption)
        answer = example.teacher.answer
        if example.question.options:
            answer = example.question.options["ABCD".index(answer)]
        assert answer == truth, example.question.text
        checked += 1
    assert checked > _NUM_CHECKED * 0.8


@pytest.mark.parametrize("level", ["tiny", "small"])
def test_all_questions_of_a_level_occur(level):
    chosen = numerals_examples.level_named(level)
    num_asked = len(chosen.grid_questions) + len(chosen.chart_questions)
    met = {
        example.question.type.removesuffix("_choice")
        for example in numerals_corpus.stream(level=level, seed=0, name="align", rows=600)
    }
    assert len(met) == num_asked


@pytest.mark.parametrize("level", ["tiny", "small"])
def test_without_slips_public_demonstrations_are_always_right(level):
    slips = numerals_corpus.slips_of(level, {"perception": 0.0, "arithmetic": 0.0, "habit": 0.0})
    for example in numerals_corpus.stream(level=level, seed=2, name="public", rows=300):
        demonstration = example.public(slips)
        assert demonstration.answer == example.teacher.answer
        assert not demonstration.is_misread
        assert demonstration.num_arithmetic_slips == 0


def test_digits_are_misread_at_the_stated_rate_and_only_as_what_they_resemble():
    scene = _grid(*["r1 r1 r1 r1 r1 r1 r1 r1 r1 r1"] * 10)
    rng = random.Random(0)
    seen = [
        d
        for _ in range(50)
        for d in numerals_scenes.digits_of(
            numerals_scenes.misread(scene, rng, rate=0.2, habit_rate=0.0).marks
        )
    ]
    assert set(seen) == {1, 7}
    # 5000 draws at 0.2: the standard deviation of the share is 0.0057.
    assert abs(seen.count(7) / len(seen) - 0.2) < 0.03


def test_bars_are_misread_by_one_and_stay_on_the_axis():
    scene = _chart(("A", 1, "red"), ("B", 20, "blue"), ("C", 10, "red"))
    rng = random.Random(0)
    values = [
        tuple(
            bar.value for bar in numerals_scenes.misread(scene, rng, rate=1.0, habit_rate=0.0).bars
        )
        for _ in range(40)
    ]
    assert {value[0] for value in values} == {2}
    assert {value[1] for value in values} == {19}
    assert {value[2] for value in values} == {9, 11}


def test_results_slip_at_the_stated_rate_by_one_and_are_counted():
    arithmetic = numerals_questions.Arithmetic(random.Random(0), rate=0.3, habit_rate=0.0)
    results = [arithmetic.result(7) for _ in range(3000)]
    assert set(results) == {6, 7, 8}
    assert arithmetic.num_slips == sum(result != 7 for result in results)
    # The standard deviation of the share is 0.0084.
    assert abs(arithmetic.num_slips / 3000 - 0.3) < 0.04
    assert numerals_questions.Arithmetic(random.Random(0), rate=1.0, habit_rate=0.0).result(0) == 1


def test_habits_are_made_wherever_they_can_be_and_nowhere_else():
    always = numerals_questions.Arithmetic(random.Random(0), rate=0.0, habit_rate=1.0)
    assert [always.add(7, 5), always.add(7, 2), always.add(17, 5), always.add(10, 5)] == [
        2, 9, 12, 15,
    ]  # fmt: skip
    assert always.evens((0, 3, 4)) == (4,)
    assert always.evens((2, 3, 4)) == (2, 4)
    assert always.num_slips == 3
    seen = numerals_scenes.misread(_grid("r9 b4 b1"), random.Random(0), rate=0.0, habit_rate=1.0)
    assert numerals_scenes.digits_of(seen.marks) == (4, 4, 1)


@pytest.mark.parametrize("habit", [0.65, 1.0])
def test_habits_are_followed_at_the_stated_rate(habit):
    arithmetic = numerals_questions.Arithmetic(random.Random(1), rate=0.0, habit_rate=habit)
    lost = sum(arithmetic.add(7, 5) == 2 for _ in range(2000))
    # The standard deviation of the share is at most 0.011.
    assert abs(lost / 2000 - habit) < 0.05


def test_a_public_demonstration_reasons_consistently_from_what_it_misread():
    slips = numerals_corpus.slips_of("tiny", {"perception": 1.0, "arithmetic": 0.0, "habit": 0.0})
    for example in numerals_corpus.stream(level="tiny", seed=0, name="public", rows=200):
        demonstration = example.public(slips)
        caption, _ = numerals_demonstrations.split_segments(demonstration.response)
        question = example.question
        assert demonstration.answer == _recomputed(question.type, question.text, caption)
        digits = numerals_scenes.digits_of(example.scene.marks)
        assert demonstration.is_misread == any(digit != 9 for digit in digits)


def test_a_result_that_is_not_offered_leads_to_the_nearest_option():
    scene = _grid("r4 b7")
    asked = numerals_questions.as_choice(
        numerals_questions.row_sum(scene, random.Random(0)), scene, random.Random(0)
    )
    assert "11" in asked.options
    slipped = asked.work(_grid("r9 b9"), numerals_questions.exact())
    nearest = min(asked.options, key=lambda option: abs(18 - int(option)))
    assert asked.options["ABCD".index(slipped.answer)] == nearest


@pytest.mark.parametrize("level", ["tiny", "small"])
def test_no_response_holds_a_tag_twice(level):
    slips = numerals_corpus.slips_of(level, {})
    for example in numerals_corpus.stream(level=level, seed=0, name="public", rows=100):
        for response in (example.teacher.response, example.public(slips).response):
            assert re.fullmatch(
                r"<caption>\n[^<>]+\n</caption>\n<think>\n[^<>]+\n</think>\n"
                r"<answer>\n[^<>]+\n</answer>",
                response,
            )


def test_the_system_prompt_shows_the_layout_of_the_responses():
    layout = re.sub(r"\[.*?\]", "x", prompts.SYSTEM_PROMPT)
    response = numerals_demonstrations.response_text(caption="- x", think="x", answer="x")
    assert layout.endswith(f"\n\n{response}\n")
