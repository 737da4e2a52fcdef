"""What the strict judge promises of every answer, not of chosen ones.

The values are made from their meaning, so that right and wrong are known without the judge.
"""

import contextlib
import fractions
import time

import hypothesis
from hypothesis import strategies as st

from prism_jax.rewards import answer, symbolic
from tests.fuzz import response_targets

_SETTINGS = hypothesis.settings(
    max_examples=80,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
_DECORATIONS = (
    "{}", " {} ", "${}$", "$${}$$", "\\({}\\)", "\\[{}\\]", "\\boxed{{{}}}", "$\\boxed{{{}}}$",
    "**{}**", "*{}*", "`{}`", "The answer is {}.", "The answer is: {}", "Answer: {}", "\n{}\n",
    "So the answer is {}.", "\\text{{{}}}", "\\mathbf{{{}}}", "<b>{}</b>", "```\n{}\n```",
    "### {}", "#### {}", "\\textcolor{{red}}{{{}}}", "{}.", "\\left({}\\right)",
)  # fmt: skip
# Not every truth may stand in every decoration: a list in parentheses is a tuple.
_PLAIN = tuple(form for form in _DECORATIONS if "left(" not in form)
_LENGTHS = {"mm": -3, "cm": -2, "m": 0, "km": 3}
_MASSES = {"mg": -3, "g": 0, "kg": 3}
_UNITS = (_LENGTHS, _MASSES)
_SYMBOLS = "0123456789ABx=()[]{},.;:/\\^_-+%$ \n≈<>or"
_CM = ("", " cm")
_WORDS = ("red", "blue", "triangle", "Paris", "north", "increases", "carbon dioxide", "parabola")


def _is_paid(given: str, truth: str) -> bool:
    return answer.is_correct(given, truth, symbolic.verify)


@st.composite
def _numbers(draw) -> tuple[str, fractions.Fraction]:
    """Draw a number as text, with its value; none is 0."""
    whole = draw(st.integers(1, 99999))
    match draw(st.integers(0, 4)):
        case 0:
            text, value = str(whole), fractions.Fraction(whole)
        case 1:
            text, value = f"{whole:,}", fractions.Fraction(whole)
        case 2:
            digits = draw(st.integers(1, 999))
            text = f"{whole}.{digits:03d}"
            value = fractions.Fraction(text)
        case 3:
            low = draw(st.integers(2, 99))
            text, value = f"{whole}/{low}", fractions.Fraction(whole, low)
        case _:
            low = draw(st.integers(2, 99))
            text = f"\\frac{{{whole}}}{{{low}}}"
            value = fractions.Fraction(whole, low)
    if draw(st.booleans()):
        return f"-{text}", -value
    return text, value


def _letters() -> st.SearchStrategy[str]:
    return st.sampled_from("ABCDE")


@st.composite
def _points(draw) -> str:
    return f"({draw(st.integers(-99, 99))}, {draw(st.integers(-99, 99))})"


@st.composite
def _quantities(draw) -> str:
    unit = draw(st.sampled_from([*_LENGTHS, *_MASSES]))
    return f"{draw(st.integers(1, 9999))} {unit}"


_truths = st.one_of(
    _numbers().map(lambda pair: pair[0]),
    _letters(),
    _points(),
    _quantities(),
    st.sampled_from(_WORDS),
    _numbers().map(lambda pair: f"x = {pair[0]}"),
)


@_SETTINGS
@hypothesis.given(truth=_truths, form=st.sampled_from(_PLAIN), outer=st.sampled_from(_PLAIN[:6]))
def test_a_truth_in_any_decoration_equals_itself(truth, form, outer):
    assert _is_paid(form.format(truth), truth)
    assert _is_paid(truth, form.format(truth))
    assert _is_paid(outer.format(truth), form.format(truth))


@_SETTINGS
@hypothesis.given(one=_numbers(), other=_numbers(), form=st.sampled_from(_PLAIN))
def test_numbers_are_equal_when_their_values_are_and_in_both_directions(one, other, form):
    (text, value), (other_text, other_value) = one, other
    is_close = abs(value - other_value) <= fractions.Fraction(abs(value), 10**5)
    if value == other_value or not is_close:
        assert _is_paid(form.format(other_text), text) is (value == other_value)
        assert _is_paid(text, form.format(other_text)) is (value == other_value)
    whole = f"{value.numerator}/{value.denominator}"
    assert _is_paid(whole, text) and _is_paid(text, whole)


@_SETTINGS
@hypothesis.given(number=_numbers(), form=st.sampled_from(_PLAIN), unit=st.sampled_from(_CM))
def test_the_other_sign_is_never_paid(number, form, unit):
    text, _ = number
    opposite = text[1:] if text.startswith("-") else f"-{text}"
    assert not _is_paid(form.format(opposite + unit), text + unit)
    assert not _is_paid(form.format(f"x = {opposite}"), f"x = {text}")


@_SETTINGS
@hypothesis.given(
    number=st.integers(1, 9999),
    units=st.sampled_from(_UNITS).flatmap(lambda table: st.permutations(list(table))),
    form=st.sampled_from(_PLAIN),
)
def test_a_unit_is_converted_and_the_same_number_in_another_is_never_paid(number, units, form):
    given, wanted, *_ = units
    table = next(table for table in _UNITS if given in table)
    assert not _is_paid(form.format(f"{number} {given}"), f"{number} {wanted}")
    foreign = next(unit for other in _UNITS if other is not table for unit in other)
    assert not _is_paid(form.format(f"{number} {foreign}"), f"{number} {wanted}")
    scale = table[wanted] - table[given]
    converted = number * fractions.Fraction(10) ** scale
    if converted.denominator == 1:
        assert _is_paid(form.format(f"{converted.numerator} {given}"), f"{number} {wanted}")


@_SETTINGS
@hypothesis.given(chosen=_letters(), other=_letters(), form=st.sampled_from(_PLAIN))
def test_another_option_is_never_paid_however_it_is_written(chosen, other, form):
    for given in (other, f"({other})", f"{other}.", f"option {other}", f"{other}. {chosen}"):
        is_claimed_twice = given == f"{other}. {chosen}"
        if other != chosen or is_claimed_twice:
            assert not (other != chosen and _is_paid(form.format(given), chosen))
        else:
            assert _is_paid(form.format(given), chosen)
    if other != chosen:
        for given in (f"{chosen} or {other}", f"{chosen}. no, {other}", f"not {chosen}"):
            assert not _is_paid(form.format(given), chosen)


@_SETTINGS
@hypothesis.given(
    low=st.integers(-50, 50),
    width=st.integers(1, 50),
    ends=st.tuples(st.booleans(), st.booleans()),
    other_ends=st.tuples(st.booleans(), st.booleans()),
)
def test_intervals_are_equal_in_every_notation_when_ends_and_brackets_are(
    low, width, ends, other_ends
):
    notations = _interval(low, low + width, ends)
    for truth in notations:
        for given in notations:
            if {truth[0], given[0]} != {"("} or truth == given:  # a bare (1,2) may be a point
                assert _is_paid(given, truth), (given, truth)
        if ends != other_ends:
            for given in _interval(low, low + width, other_ends)[1:]:
                assert not _is_paid(given, truth), (given, truth)


def _interval(low: int, high: int, ends: tuple[bool, bool]) -> list[str]:
    """Return notations of one interval; `ends` says which are part of it."""
    left, right = "[" if ends[0] else "(", "]" if ends[1] else ")"
    below, above = "\\le" if ends[0] else "<", "\\le" if ends[1] else "<"
    return [
        f"{left}{low}, {high}{right}",
        f"x \\in {left}{low}, {high}{right}",
        f"{low} {below} x {above} {high}",
        f"\\{{x \\mid {low} {below} x {above} {high}\\}}",
    ]


@hypothesis.settings(_SETTINGS, max_examples=150)
@hypothesis.given(
    given=st.text(max_size=60) | st.text(_SYMBOLS, max_size=400),
    truth=st.text(max_size=60) | _truths,
)
def test_any_text_ends_in_a_verdict_at_once(given, truth):
    begun = time.process_time()
    for pair in ((given, truth), (truth, given), (given, given), (f"{given}≈{truth}", truth)):
        with contextlib.suppress(response_targets.MathematicsNeeded):
            assert answer.is_correct(*pair, response_targets.no_mathematics) in (True, False)
    assert time.process_time() - begun < 0.5
