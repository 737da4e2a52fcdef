"""Questions over `numerals` scenes, each with the reasoning that answers it.

A question function takes a scene and picks the subject of its question at random; it returns None
if the scene does not suit it (a single ink to compare, a tie for the largest). A question's `work`
is run on a reading of the scene: on the true scene with exact arithmetic it gives the ground truth
and the teacher's reasoning, on a misread scene with slipping arithmetic a public demonstration.
"""

import dataclasses
import random
from collections.abc import Callable

from prism_jax.data.numerals import scenes as numerals_scenes

_LETTERS = "ABCD"


class Arithmetic:
    """Arithmetic whose results are wrong at `rate`; `num_slips` counts the mistakes.

    Two mistakes are habits, made at `habit_rate` wherever they can occur: a lost carry in a sum
    (7 + 5 = 2), and zero counted as odd.
    """

    def __init__(self, rng: random.Random, *, rate: float, habit_rate: float) -> None:
        self._rng = rng
        self._rate = rate
        self._habit_rate = habit_rate
        self.num_slips = 0

    def _follows_habit(self) -> bool:
        follows = self._rng.random() < self._habit_rate
        self.num_slips += follows
        return follows

    def add(self, a: int, b: int) -> int:
        """Return a + b, without its carry by habit, or off by one on a slip."""
        if a % 10 + b % 10 >= 10 and self._follows_habit():
            return a + b - 10
        return self.result(a + b)

    def evens(self, digits: tuple[int, ...]) -> tuple[int, ...]:
        """Return the even digits, by habit without the zeros."""
        takes_zero_for_odd = 0 in digits and self._follows_habit()
        return tuple(d for d in digits if d % 2 == 0 and not (d == 0 and takes_zero_for_odd))

    def result(self, value: int) -> int:
        """Return the value, or on a slip a neighbouring value that is not negative."""
        if self._rng.random() >= self._rate:
            return value
        self.num_slips += 1
        return value + 1 if value == 0 else value + self._rng.choice((-1, 1))

    def pick(self, best: str, candidates: list[str]) -> str:
        """Return the best candidate, or on a slip another candidate, if there is one."""
        others = sorted(set(candidates) - {best})
        if not others or self._rng.random() >= self._rate:
            return best
        self.num_slips += 1
        return self._rng.choice(others)


def exact() -> Arithmetic:
    """Return arithmetic that never slips."""
    return Arithmetic(random.Random(0), rate=0.0, habit_rate=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Reasoning and the answer that it gives."""

    steps: tuple[str, ...]  # a sentence per step
    terse: str  # the same in a line
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a scene."""

    type: str
    text: str
    work: Callable[[numerals_scenes.Scene, Arithmetic], Work]
    options: tuple[str, ...]  # of a multiple-choice question, else empty


def listed(values) -> str:
    """Return the values with commas between them."""
    return ", ".join(str(value) for value in values)


def _open_question(kind: str, text: str, work) -> Question:
    return Question(type=kind, text=text, work=work, options=())


def add_up(values: tuple[int, ...], arithmetic: Arithmetic) -> tuple[int, tuple[str, ...], str]:
    """Return the sum of at least one value, its steps, and the sum as a line."""
    total, steps = values[0], []
    for value in values[1:]:
        result = arithmetic.add(total, value)
        steps.append(f"{total} + {value} = {result}.")
        total = result
    if not steps:
        steps.append(f"There is only one value: {total}.")
    return total, tuple(steps), f"{' + '.join(map(str, values))} = {total}"


def _row_name(grid: numerals_scenes.Grid, r: int) -> str:
    return "the row" if len(grid.rows) == 1 else f"row {r + 1}"


def read_row(grid: numerals_scenes.Grid, rng: random.Random) -> Question | None:
    """Ask for the digits of a row as a number; at least two digits, without a leading zero."""
    r = rng.randrange(len(grid.rows))
    name = _row_name(grid, r)
    digits = numerals_scenes.digits_of(grid.rows[r])
    if len(digits) < 2 or digits[0] == 0:
        return None

    def work(seen: numerals_scenes.Grid, arithmetic: Arithmetic) -> Work:
        row = numerals_scenes.digits_of(seen.rows[r])
        number = "".join(map(str, row))
        steps = (f"The digits of {name} are {listed(row)}.", f"Together they read {number}.")
        return Work(steps=steps, terse=f"It reads {number}.", answer=number)

    return _open_question("read_row", f"Read the digits of {name} from left to right.", work)


def row_sum(grid: numerals_scenes.Grid, rng: random.Random) -> Question | None:
    """Ask for the sum of a row of at least two digits."""
    r = rng.randrange(len(grid.rows))
    name = _row_name(grid, r)
    if len(numerals_scenes.digits_of(grid.rows[r])) < 2:
        return None

    def work(seen: numerals_scenes.Grid, arithmetic: Arithmetic) -> Work:
        row = numerals_scenes.digits_of(seen.rows[r])
        total, steps, terse = add_up(row, arithmetic)
        first = f"The digits of {name} are {listed(row)}."
        return Work(steps=(first, *steps), terse=f"{terse}.", answer=str(total))

    return _open_question("row_sum", f"What is the sum of the digits of {name}?", work)


def pair_sum(grid: numerals_scenes.Grid, rng: random.Random) -> Question | None:
    """Ask for the sum of a row of exactly two digits: a single addition."""
    return row_sum(grid, rng) if len(grid.rows[0]) == 2 else None


def column_sum(grid: numerals_scenes.Grid, rng: random.Random) -> Question | None:
    """Ask for the sum of a column of at least two digits."""
    c = rng.randrange(len(grid.rows[0]))
    if len(numerals_scenes.digits_of(tuple(row[c] for row in grid.rows))) < 2:
        return None

    def work(seen: numerals_scenes.Grid, arithmetic: Arithmetic) -> Work:
        column = numerals_scenes.digits_of(tuple(row[c] for row in seen.rows))
        total, steps, terse = add_up(column, arithmetic)
        first = f"The digits of column {c + 1} are {listed(column)}."
        return Work(steps=(first, *steps), terse=f"{terse}.", answer=str(total))

    return _open_question("column_sum", f"What is the sum of the digits of column {c + 1}?", work)


def largest_digit(grid: numerals_scenes.Grid, rng: random.Random) -> Question | None:
    """Ask for the largest of at least two digits."""
    if len(numerals_scenes.digits_of(grid.marks)) < 2:
        return None

    def work(seen: numerals_scenes.Grid, arithmetic: Arithmetic) -> Work:
        digits = numerals_scenes.digits_of(seen.marks)
        best = arithmetic.pick(str(max(digits)), [str(digit) for digit in digits])
        steps = (f"The digits are {listed(digits)}.", f"The largest of them is {best}.")
        return Work(steps=steps, terse=f"The largest is {best}.", answer=best)

    return _open_question("largest_digit", "What is the largest digit?", work)


def count_even(grid: numerals_scenes.Grid, rng: random.Random) -> Question | None:
    """Ask how many digits are even."""
    if len(numerals_scenes.digits_of(grid.marks)) < 2:
        return None

    def work(seen: numerals_scenes.Grid, arithmetic: Arithmetic) -> Work:
        digits = numerals_scenes.digits_of(seen.marks)
        evens = arithmetic.evens(digits)
        count = arithmetic.result(len(evens))
        parities = " ".join(
            f"{digit} is {'even' if digit in evens else 'odd'}." for digit in digits
        )
        steps = (parities, f"The number of even digits is {count}.")
        return Work(steps=steps, terse=f"Even: {listed(evens) or 'none'}.", answer=str(count))

    return _open_question("count_even", "How many digits are even?", work)


def sum_of_even(grid: numerals_scenes.Grid, rng: random.Random) -> Question | None:
    """Ask for the sum of the even digits: choose, then add."""
    if sum(digit % 2 == 0 for digit in numerals_scenes.digits_of(grid.marks)) < 2:
        return None

    def work(seen: numerals_scenes.Grid, arithmetic: Arithmetic) -> Work:
        digits = numerals_scenes.digits_of(seen.marks)
        evens = arithmetic.evens(digits)
        first = f"The even digits are {listed(evens) or 'none'}."
        # A misread scene may have no even digit.
        total, steps, terse = add_up(evens, arithmetic) if evens else (0, (), "none = 0")
        return Work(steps=(first, *steps), terse=f"Even: {terse}.", answer=str(total))

    return _open_question("sum_of_even", "What is the sum of the even digits?", work)


def row_difference(grid: numerals_scenes.Grid, rng: random.Random) -> Question | None:
    """Ask for the difference between the sums of two rows: two sums, a subtraction."""
    rows = [r for r, row in enumerate(grid.rows) if numerals_scenes.digits_of(row)]
    if len(rows) < 2:
        return None
    a, b = sorted(rng.sample(rows, 2))

    def work(seen: numerals_scenes.Grid, arithmetic: Arithmetic) -> Work:
        totals, steps, terse = [], [], []
        for r in (a, b):
            row = numerals_scenes.digits_of(seen.rows[r])
            total, row_steps, row_terse = add_up(row, arithmetic)
            steps += [f"The digits of row {r + 1} are {listed(row)}.", *row_steps]
            totals.append(total)
            terse.append(row_terse)
        high, low = max(totals), min(totals)
        difference = arithmetic.result(high - low)
        last = f"{high} - {low} = {difference}."
        return Work(
            steps=(*steps, last), terse=f"{'; '.join(terse)}; {last}", answer=str(difference)
        )

    text = f"What is the difference between the sums of row {a + 1} and row {b + 1}?"
    return _open_question("row_difference", text, work)


def ink_compare(grid: numerals_scenes.Grid, rng: random.Random) -> Question | None:
    """Ask which of two colours has the larger sum; the sums differ."""
    by_ink = {}
    for mark in grid.marks:
        if mark.kind == "digit":
            by_ink[mark.ink] = by_ink.get(mark.ink, 0) + int(mark.name)
    if len(by_ink) < 2:
        return None
    inks = rng.sample(sorted(by_ink), 2)
    if by_ink[inks[0]] == by_ink[inks[1]]:
        return None

    def work(seen: numerals_scenes.Grid, arithmetic: Arithmetic) -> Work:
        totals, steps, terse = [], [], []
        for ink in inks:
            marks = tuple(mark for mark in seen.marks if mark.ink == ink)
            digits = numerals_scenes.digits_of(marks)
            total, ink_steps, ink_terse = add_up(digits, arithmetic)
            steps += [f"The {ink} digits are {listed(digits)}.", *ink_steps]
            totals.append(total)
            terse.append(f"{ink}: {ink_terse}")
        # On misread digits the sums may be equal; then the first colour is named.
        best = inks[0] if totals[0] >= totals[1] else inks[1]
        steps.append(f"{max(totals)} is more than {min(totals)}, so it is {best}.")
        return Work(steps=tuple(steps), terse=f"{'; '.join(terse)}.", answer=best)

    text = f"Which digits have the larger sum, the {inks[0]} or the {inks[1]} ones?"
    return _open_question("ink_compare", text, work)


def largest_times_smallest(grid: numerals_scenes.Grid, rng: random.Random) -> Question | None:
    """Ask for the product of the largest and the smallest of at least two digits, none a zero."""
    digits = numerals_scenes.digits_of(grid.marks)
    if len(digits) < 2 or 0 in digits:
        return None

    def work(seen: numerals_scenes.Grid, arithmetic: Arithmetic) -> Work:
        digits = numerals_scenes.digits_of(seen.marks)
        high, low = max(digits), min(digits)
        last = f"{high} * {low} = {(product := arithmetic.result(high * low))}."
        steps = (
            f"The digits are {listed(digits)}.",
            f"The largest of them is {high}.",
            f"The smallest of them is {low}.",
            last,
        )
        return Work(steps=steps, terse=last, answer=str(product))

    text = "What is the largest digit times the smallest digit?"
    return _open_question("largest_times_smallest", text, work)


def as_choice(question: Question, scene: numerals_scenes.Scene, rng: random.Random) -> Question:
    """Return the question with four numbers to choose from; its answer becomes a letter.

    If a result is not offered, the answer is the nearest option.
    """
    truth = int(question.work(scene, exact()).answer)
    near = [truth + step for step in (-10, -3, -2, -1, 1, 2, 3, 10) if truth + step >= 0]
    numbers = rng.sample([truth, *rng.sample(near, 3)], 4)
    options = tuple(str(number) for number in numbers)

    def work(seen: numerals_scenes.Scene, arithmetic: Arithmetic) -> Work:
        inner = question.work(seen, arithmetic)
        place = min(range(4), key=lambda i: abs(numbers[i] - int(inner.answer)))
        is_offered = inner.answer in options
        last = f"{'That' if is_offered else 'The nearest'} is option {_LETTERS[place]}."
        return Work(
            steps=(*inner.steps, f"The result is {inner.answer}.", last),
            terse=f"{inner.terse} Option {_LETTERS[place]}.",
            answer=_LETTERS[place],
        )

    offered = "\n".join(f"{_LETTERS[i]}. {option}" for i, option in enumerate(options))
    text = f"{question.text}\n{offered}\nAnswer with the letter of the right option."
    return Question(type=f"{question.type}_choice", text=text, work=work, options=options)
