"""The default judge and the released one: recorded cases, cases by hand, and bounded cost."""

import time

import pytest

from prism_jax.rewards import answer, answer_official, symbolic
from tests.rewards import answer_cases, oracle_files


def never(method, given, truth):
    raise AssertionError(f"{method}({given!r}, {truth!r}) needs mathematics")


def test_oracle_answers_are_judged_as_a_user_expects():
    wrong = [
        case
        for case in oracle_files.read("answers.json")
        if answer.is_correct(case["answer"], case["ground_truth"], symbolic.verify)
        is not case["correct"]
    ]
    assert not wrong


def test_oracle_answers_are_judged_as_released_by_the_official_rules():
    for case in oracle_files.read("answers.json"):
        given = case["answer"].strip()
        # The released code rewards an empty answer before it asks its judge.
        right = bool(given) and answer_official.is_correct(
            given, case["ground_truth"], symbolic.verify
        )
        assert right is (case["official_accuracy"] == 1.0), case


@pytest.mark.parametrize(("given", "truth"), answer_cases.RIGHT)
def test_right_answers_are_accepted(given, truth):
    assert answer.is_correct(given, truth, symbolic.verify)


@pytest.mark.parametrize(("given", "truth"), answer_cases.WRONG)
def test_wrong_answers_are_refused(given, truth):
    assert not answer.is_correct(given, truth, symbolic.verify)


@pytest.mark.parametrize(("given", "truth"), [pair for pair in answer_cases.RIGHT if pair[1]])
def test_every_truth_equals_itself_and_is_judgeable(given, truth):
    assert answer.is_correct(truth, truth, never)
    assert answer.check_ground_truth(truth) is None


def test_most_cases_need_no_mathematics():
    deferred = 0
    for given, truth in (*answer_cases.RIGHT, *answer_cases.WRONG):
        try:
            answer.is_correct(given, truth, never)
        except AssertionError:
            deferred += 1
    assert deferred < 0.2 * len(answer_cases.RIGHT + answer_cases.WRONG)


@pytest.mark.parametrize("judge", [answer.is_correct, answer_official.is_correct])
@pytest.mark.parametrize(
    "piece",
    ["(", "{", " ", "\n", "a ", "1,", "1 ", "$", "\\text{", "**a", "A or ", "x=", "9", "\\frac{",
     "1 h ", "a_{1}", "= ", "≈", "½", "²", "is ", "\\boxed{", "1:", "the ", "- ", "a-", "(A)", "'"],
)  # fmt: skip
def test_rules_without_mathematics_are_fast_on_any_text(judge, piece):
    text = piece * (1000 // len(piece))
    for given, truth in ((text + "1", "5 cm"), ("5 cm", text), ("x = " + text, "B. cat")):
        start = time.perf_counter()
        judge(given[:1023], truth, lambda *_: False)
        # Milliseconds when alone; the bound is for a machine that others use.
        assert time.perf_counter() - start < 1.0


def test_any_equivalent_answer_counts_by_extraction_unless_the_list_holds_the_empty_marker():
    def judge(equivalents):
        return answer_official.is_correct_by_extraction("0.5", "7", equivalents, symbolic.verify)

    assert judge(["3", "\\frac{1}{2}"])
    assert not judge(["3", "\\frac{1}{2}", "__EMPTY__"])
    assert not judge([])


@pytest.mark.parametrize(
    ("given", "truth"),
    [("5 kg", "5 lb"), ("10:30", "1030"), ("(1,23)", "(12,3)"), ("A. x or B. y", "A"),
     ("I choose (B) not (C)", "B"), ("(1) 3 (2) 4", "3;4"), ("1e3", "1000"), ("5元", "5")],
)  # fmt: skip
def test_the_released_rules_accept(given, truth):
    assert answer_official.is_correct(given, truth, lambda *_: False)


@pytest.mark.parametrize(
    ("given", "truth"),
    [("1,234", "1234"), ("(1, 2)", "(1,2)"), ("B", "B. cat"), ("3;2", "2;3"), ("0.333", "1/3"),
     ("A", "B. (1,2)"), ("3.14", "3.1416"), ("0.001", "0"), ("", "A")],
)  # fmt: skip
def test_the_released_rules_refuse(given, truth):
    assert not answer_official.is_correct(given, truth, lambda *_: False)


def test_released_choice_letters_prefer_the_stated_answer_over_earlier_markers():
    assert answer_official.is_correct("(A) is tempting but the answer is C.", "C", never)


@pytest.mark.parametrize(
    ("truth", "complaint"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("$$ $$", "empty"),
        ("x" * 1024, "shorter than 1024"),
        ("5</answer>", "tag"),
        ("\\frac{1}{2", "unbalanced"),
        ("5\x00", "control"),
    ],
)
def test_a_truth_that_cannot_be_judged_is_reported(truth, complaint):
    assert complaint in answer.check_ground_truth(truth)


def test_symbolic_refuses_a_method_it_does_not_have():
    with pytest.raises(ValueError, match="no method"):
        symbolic.verify("guess", "1", "1")
