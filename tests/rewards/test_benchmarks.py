"""The scorers of benchmarks compute what the published ones computed on recorded responses."""

import time

import pytest

from prism_jax.rewards import symbolic
from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.rewards.benchmarks import groups, letters, llm, mathvista, reading, rules, wemath
from tests.rewards import oracle_files


def _facts(name: str, protocol: str = "prism", **changes) -> facts_lib.Facts:
    given = {"question": "q", "answer": "A", "answer_type": "", "choices": (), "precision": None}
    given |= {"group": {"category": "VD", "figure": "1"}, "max_tokens": 8}
    return facts_lib.Facts(name=name, protocol=protocol, **(given | changes))


def _is_right(read: reading.Reading) -> bool:
    if read.is_right is not None:
        return read.is_right
    return any(symbolic.verify("rounded", read.answer, truth) for truth in read.truths)


_FACTS = ("answer", "answer_type", "precision")


def test_the_oracle_scorers_read_the_same_answers():
    differences = []
    for case in oracle_files.read("benchmark_answers.json"):
        facts = _facts(
            case["benchmark"],
            case["protocol"],
            choices=tuple(case["choices"]),
            **{name: case[name] for name in _FACTS},
        )
        if case["extracted"]:
            read = mathvista.extracted(facts, case["response"])
        else:
            read = rules.read(facts, case["response"])
        # Where the published scorer draws an option, asks a model, or decides nothing by rule.
        expected = {"guess": ("guess",), "asks": ("loose", "none"), "undecided": ("none",)}
        if case["outcome"] in expected:
            is_same = read.how in expected[case["outcome"]]
        else:
            is_same = _is_right(read) == (case["outcome"] == "right") and read.how != "guess"
        if not is_same:
            differences.append((case, read))
    assert not differences, differences[:3]


def test_the_oracle_groups_have_the_same_scores():
    for case in oracle_files.read("benchmark_groups.json"):
        questions = [(question, question["is_right"]) for question in case["questions"]]
        found = groups.scores(case["benchmark"], questions)
        means = {name: sum(values) / len(values) for name, values in found.items()}
        assert means == pytest.approx(case["scores"], abs=1e-12)


def test_a_problem_of_which_a_step_was_not_answered_has_no_score():
    steps = [({"problem": "1", "key": key}, True) for key in ("2steps_1", "2steps_multi")]
    assert groups.scores("wemath", steps) == {}
    whole = groups.scores("wemath", [*steps, ({"problem": "1", "key": "2steps_2"}, True)])
    assert whole["score_strict"] == [1.0]


def test_an_open_answer_of_mmmu_is_right_by_its_own_rule_and_never_by_the_released_one():
    answer = "So 3 x 14 = 42 apples. The final answer is 42"
    for protocol, is_right in (("upstream", True), ("prism", False)):
        facts = _facts("mmmu", protocol, answer="['42', 'forty-two']")
        assert rules.read(facts, answer).is_right is is_right


def test_a_guess_is_the_same_in_every_run_and_differs_between_questions():
    guesses = [letters.choose("nothing", ["x"] * 10, seed=str(n)) for n in range(40)]
    assert guesses == [letters.choose("nothing", ["x"] * 10, seed=str(n)) for n in range(40)]
    assert {how for _, how in guesses} == {"guess"}
    assert len({letter for letter, _ in guesses}) > 5


def test_the_last_closed_box_counts_and_many_open_ones_take_no_time():
    assert wemath.last_box("\\boxed{A} so {x} \\boxed{B{1}} and \\boxed{C") == "B{1}"
    assert wemath.last_box("\\boxed{a \\boxed{b} c}") == "b"
    assert wemath.last_box("\\boxed{" * 100_000) == ""


_LOOPS = (
    "<answer>",
    " ",
    "1",
    "1,",
    "\\boxed{",
    'The answer is "',
    "is ",
    "(A) ",
    "1. A",
    "{",
    ".",
)


@pytest.mark.parametrize("name", rules.RULES)
def test_a_response_that_repeats_itself_to_the_limit_is_read_at_once(name):
    begun = time.process_time()
    for loop in _LOOPS:
        for end in ("", "x", "</answer>"):
            response = "<answer>" + loop * (100_000 // len(loop)) + end
            for protocol in facts_lib.PROTOCOLS:
                for choices in ((), ("cat", "dog")):
                    rules.read(_facts(name, protocol, choices=choices, precision=1), response)
    assert time.process_time() - begun < 20


@pytest.mark.parametrize(
    ("name", "protocol", "how", "is_right", "question"),
    [
        ("mathvista", "prism", "exact", True, None),
        ("mathvista", "prism", "exact", False, "right"),
        ("mathvista", "prism", "loose", True, "extract"),
        ("mathvista", "upstream", "exact", False, None),
        ("mathvision", "upstream", "exact", False, None),
        ("mathvision", "prism", "exact", False, "right"),
        ("mathverse", "upstream", "exact", True, "right"),
        ("mathverse", "prism", "exact", True, None),
        ("wemath", "upstream", "none", False, "right"),
        ("mmmu", "upstream", "guess", False, None),
        ("mmmu", "prism", "guess", False, "right"),
        ("hallusion", "prism", "exact", False, None),
        ("hallusion", "prism", "none", False, "clear"),
        ("hallusion", "upstream", "exact", True, "clear"),
    ],
)
def test_a_model_is_asked_where_the_published_scorer_asks(name, protocol, how, is_right, question):
    read = reading.Reading(answer="x", is_right=is_right, how=how)
    assert rules.question(_facts(name, protocol), read, is_right=is_right) == question


@pytest.mark.parametrize(
    ("reply", "is_one"),
    [("1", True), (" 1.\n", True), ("[1]", True), ("0", False), ("10", False), ("0.1", False)],
)
def test_a_reply_says_right_by_a_one_that_stands_alone(reply, is_one):
    assert llm.is_one(reply) is is_one


def test_facts_are_read_as_they_were_written():
    facts = _facts("mmmu", choices=("a", "b"), precision=2)
    row = {facts_lib.KEY: facts.to_json(), "question_type": "x"}
    assert facts_lib.read(row, place="row 1") == facts
    assert facts_lib.read({"question_type": "x"}, place="row 1") is None
    with pytest.raises(ValueError, match=r"row 1: extra_info.benchmark.protocol must be one of"):
        facts_lib.read({facts_lib.KEY: facts.to_json() | {"protocol": "ours"}}, place="row 1")
