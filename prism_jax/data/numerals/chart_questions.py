"""Questions over `numerals` bar charts; the rules are those of `data.numerals.questions`."""

import random

from prism_jax.data.numerals import questions as numerals_questions
from prism_jax.data.numerals import scenes as numerals_scenes


def _open_question(kind: str, text: str, work) -> numerals_questions.Question:
    return numerals_questions.Question(type=kind, text=text, work=work, options=())


def _listing(bars: tuple[numerals_scenes.Bar, ...]) -> str:
    return numerals_questions.listed(f"{bar.label} {bar.value}" for bar in bars)


def tallest_value(
    chart: numerals_scenes.Chart, rng: random.Random
) -> numerals_questions.Question | None:
    """Ask for the value of the tallest bar."""

    def work(
        seen: numerals_scenes.Chart, arithmetic: numerals_questions.Arithmetic
    ) -> numerals_questions.Work:
        best = max(bar.value for bar in seen.bars)
        label = next(bar.label for bar in seen.bars if bar.value == best)
        steps = (
            f"The bars are {_listing(seen.bars)}.",
            f"The tallest bar is {label}.",
            f"Its value is {best}.",
        )
        return numerals_questions.Work(steps=steps, terse=f"{label} is {best}.", answer=str(best))

    return _open_question("tallest_value", "What is the value of the tallest bar?", work)


def tallest_label(
    chart: numerals_scenes.Chart, rng: random.Random
) -> numerals_questions.Question | None:
    """Ask which bar is the tallest; there is only one."""
    values = sorted(bar.value for bar in chart.bars)
    if values[-1] == values[-2]:
        return None

    def work(
        seen: numerals_scenes.Chart, arithmetic: numerals_questions.Arithmetic
    ) -> numerals_questions.Work:
        best = max(bar.value for bar in seen.bars)
        label = next(bar.label for bar in seen.bars if bar.value == best)
        label = arithmetic.pick(label, [bar.label for bar in seen.bars])
        steps = (f"The bars are {_listing(seen.bars)}.", f"The tallest bar is {label}.")
        return numerals_questions.Work(steps=steps, terse=f"The tallest is {label}.", answer=label)

    return _open_question("tallest_label", "Which bar is the tallest?", work)


def count_above(
    chart: numerals_scenes.Chart, rng: random.Random
) -> numerals_questions.Question | None:
    """Ask how many bars are above a line of the axis."""
    line = rng.randrange(chart.tick, chart.top, chart.tick)

    def work(
        seen: numerals_scenes.Chart, arithmetic: numerals_questions.Arithmetic
    ) -> numerals_questions.Work:
        above = [bar.label for bar in seen.bars if bar.value > line]
        count = arithmetic.result(len(above))
        named = numerals_questions.listed(above) or "none"
        steps = (
            f"The bars are {_listing(seen.bars)}.",
            f"The bars above {line} are {named}.",
            f"Their number is {count}.",
        )
        return numerals_questions.Work(
            steps=steps, terse=f"Above {line}: {named}.", answer=str(count)
        )

    return _open_question("count_above", f"How many bars are above {line}?", work)


def _two_bars(chart: numerals_scenes.Chart, rng: random.Random) -> tuple[int, int]:
    first, second = sorted(rng.sample(range(len(chart.bars)), 2))
    return first, second


def bar_sum(chart: numerals_scenes.Chart, rng: random.Random) -> numerals_questions.Question | None:
    """Ask for the sum of two bars."""
    i, j = _two_bars(chart, rng)

    def work(
        seen: numerals_scenes.Chart, arithmetic: numerals_questions.Arithmetic
    ) -> numerals_questions.Work:
        a, b = seen.bars[i], seen.bars[j]
        total = arithmetic.add(a.value, b.value)
        last = f"{a.value} + {b.value} = {total}."
        steps = (f"Bar {a.label} is {a.value}.", f"Bar {b.label} is {b.value}.", last)
        return numerals_questions.Work(steps=steps, terse=last, answer=str(total))

    a, b = chart.bars[i].label, chart.bars[j].label
    return _open_question("bar_sum", f"What is the sum of bar {a} and bar {b}?", work)


def bar_difference(
    chart: numerals_scenes.Chart, rng: random.Random
) -> numerals_questions.Question | None:
    """Ask how far apart two bars are."""
    i, j = _two_bars(chart, rng)

    def work(
        seen: numerals_scenes.Chart, arithmetic: numerals_questions.Arithmetic
    ) -> numerals_questions.Work:
        a, b = seen.bars[i], seen.bars[j]
        high, low = max(a.value, b.value), min(a.value, b.value)
        difference = arithmetic.result(high - low)
        last = f"{high} - {low} = {difference}."
        steps = (f"Bar {a.label} is {a.value}.", f"Bar {b.label} is {b.value}.", last)
        return numerals_questions.Work(steps=steps, terse=last, answer=str(difference))

    a, b = chart.bars[i].label, chart.bars[j].label
    text = f"What is the difference between bar {a} and bar {b}?"
    return _open_question("bar_difference", text, work)


def colour_compare(
    chart: numerals_scenes.Chart, rng: random.Random
) -> numerals_questions.Question | None:
    """Ask which of two colours has the larger total; the totals differ."""
    totals = {}
    for bar in chart.bars:
        totals[bar.colour] = totals.get(bar.colour, 0) + bar.value
    if len(totals) < 2:
        return None
    colours = rng.sample(sorted(totals), 2)
    if totals[colours[0]] == totals[colours[1]]:
        return None

    def work(
        seen: numerals_scenes.Chart, arithmetic: numerals_questions.Arithmetic
    ) -> numerals_questions.Work:
        sums, steps, terse = [], [], []
        for colour in colours:
            bars = tuple(bar for bar in seen.bars if bar.colour == colour)
            values = tuple(bar.value for bar in bars)
            total, colour_steps, colour_terse = numerals_questions.add_up(values, arithmetic)
            steps += [f"The {colour} bars are {_listing(bars)}.", *colour_steps]
            sums.append(total)
            terse.append(f"{colour}: {colour_terse}")
        # On misread bars the totals may be equal; then the first colour is named.
        best = colours[0] if sums[0] >= sums[1] else colours[1]
        steps.append(f"{max(sums)} is more than {min(sums)}, so it is {best}.")
        return numerals_questions.Work(
            steps=tuple(steps), terse=f"{'; '.join(terse)}.", answer=best
        )

    text = f"Which bars have the larger total, the {colours[0]} or the {colours[1]} ones?"
    return _open_question("colour_compare", text, work)
