"""The default judge and the released one: a set of pairs, recorded cases, and bounded cost."""

import dataclasses
import json
import pathlib
import re
import time

import pytest

from prism_jax.rewards import answer, answer_official, symbolic
from tests.rewards import oracle_files

_FOLDER = pathlib.Path(__file__).parent
# One pair a line: by hand, from the oracles and from public reports. Verdicts are a reader's, never
# the judge's own.
ROWS = [json.loads(line) for line in (_FOLDER / "answers.jsonl").read_text("utf-8").splitlines()]
PAGE = (_FOLDER.parent.parent / "docs/judge.md").read_text("utf-8")
REFUSED = "## Right answers that are refused"


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


@dataclasses.dataclass
class Verdict:
    """What the judge says of a row of the regression set, and whether it asked math-verify."""

    row: dict
    is_paid: bool
    is_deferred: bool


@pytest.fixture(scope="module")
def verdicts():
    """The regression set, judged; whatever the judge raises is a failure."""
    asked = []

    def mathematics(method, given, truth):
        asked.append(method)
        return symbolic.verify(method, given, truth)

    judged = []
    for row in ROWS:
        asked.clear()
        is_paid = answer.is_correct(row["answer"], row["truth"], mathematics)
        judged.append(Verdict(row, is_paid, bool(asked)))
    return judged


def test_the_regression_set_is_large_and_says_of_each_pair_where_it_comes_from():
    assert len(ROWS) > 3700
    assert len({(row["truth"], row["answer"]) for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert {*row} == {"truth", "answer", "right", "kind", "source"}
        assert isinstance(row["right"], bool) and row["kind"] and row["source"]
    assert 0.4 < sum(row["right"] for row in ROWS) / len(ROWS) < 0.6


def test_no_wrong_answer_is_paid(verdicts):
    assert not [one.row for one in verdicts if one.is_paid and not one.row["right"]]


def test_the_right_answers_that_are_refused_are_one_in_a_hundred_and_listed_on_the_page(verdicts):
    refused = {
        (one.row["answer"], one.row["truth"])
        for one in verdicts
        if one.row["right"] and not one.is_paid
    }
    listed = re.findall(r"^- `(.+?)` for `(.+?)`", PAGE.split(REFUSED)[1], re.MULTILINE)
    assert refused == set(listed)
    assert len(refused) <= 0.01 * sum(row["right"] for row in ROWS)


def test_the_examples_of_the_page_are_judged_as_it_says():
    wrong = []
    for kind, answers, truth in re.findall(
        r"^\| (paid|refused) \| (`.+`) \| `(.+)` \|", PAGE, re.MULTILINE
    ):
        for given in re.findall(r"`([^`]+)`", answers):
            if answer.is_correct(given, truth, symbolic.verify) is not (kind == "paid"):
                wrong.append((kind, given, truth))
    assert not wrong
    assert PAGE.count("\n| paid |") > 20 and PAGE.count("\n| refused |") > 20


def test_every_truth_equals_itself_and_is_judgeable():
    for truth in {row["truth"] for row in ROWS}:
        assert answer.is_correct(truth, truth, never), truth
        assert answer.check_ground_truth(truth) is None, truth


def test_most_answers_need_no_mathematics(verdicts):
    assert sum(one.is_deferred for one in verdicts) < 0.15 * len(ROWS)


def test_an_approximation_ends_in_a_verdict_whatever_stands_beside_it():
    for row in [row for row in ROWS if row["kind"] == "oracle"] + ROWS[::7]:
        for given in (f"{row['answer']} ≈ {row['truth']}", f"{row['answer']} \\approx 5"):
            assert answer.is_correct(given, row["truth"], lambda *_: False) in (True, False)


@pytest.mark.parametrize("judge", [answer.is_correct, answer_official.is_correct])
@pytest.mark.parametrize(
    "piece",
    ["(", "{", " ", "\n", "a ", "1,", "1 ", "$", "\\text{", "**a", "A or ", "x=", "9", "\\frac{",
     "1 h ", "a_{1}", "= ", "≈", "½", "²", "is ", "\\boxed{", "1:", "the ", "- ", "a-", "(A)", "'",
     "\u2028", "\n\x0b", "(A) ", "A, A and ", "Both A and ", "point B ", "\\angle ", "\\angle 1",
     "x<1 or ", "x>1,", "\\cup(1,2)", "\\{x|", "(1,2)", "\\begin{pmatrix}", "1&2\\\\", "[[1,2],",
     "two hundred ", "million ", "kg m/", "**", "*a* ", "<b>", "\\textcolor{red}{", "####",
     "{1,2},", "x>1, y=2, ", "2h 5m ", "the answer is ", ". so ", "I, ", "①", "1 ≈ ", "\\frac{dx}",
     "_{1}", "ﷺ"],
)  # fmt: skip
def test_rules_without_mathematics_are_fast_on_any_text(judge, piece):
    text = piece * (1000 // len(piece))
    for given, truth in ((text + "1", "5 cm"), ("5 cm", text), ("x = " + text, "B. cat")):
        start = time.process_time()
        judge(given[:1023], truth, lambda *_: False)
        # Of the machine that others use, only the time spent here counts.
        assert time.process_time() - start < 0.2


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
        ('{"target": "7", "steps": "6+1"}', "JSON"),
        ("['four', '4']", "JSON"),
    ],
)
def test_a_truth_that_cannot_be_judged_is_reported(truth, complaint):
    assert complaint in answer.check_ground_truth(truth)


def test_symbolic_refuses_a_method_it_does_not_have():
    with pytest.raises(ValueError, match="no method"):
        symbolic.verify("guess", "1", "1")
