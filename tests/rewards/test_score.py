"""Rewards of whole responses: the mix, the gates, the released presets, and the reasons."""

import pytest

from prism_jax import errors
from prism_jax.rewards import score, symbolic
from tests.rewards import oracle_files

STRICT = score.Rule(judge="strict", accuracy_weight=0.8, format_weight=0.2)
OFFICIAL = score.Rule(judge="official", accuracy_weight=0.8, format_weight=0.2)
GEOMETRY = "hiyouga/geometry3k"


def task(response, truth="3", *, ended=True, equivalents=(), source="mm_gad", row=None):
    return score.Task(
        response=response,
        ended=ended,
        ground_truth=truth,
        equivalent_answers=equivalents,
        data_source=source,
        row=row,
    )


def respond(answer):
    return f"<caption>a</caption><think>b</think><answer>{answer}</answer>"


def grade(one, rule=STRICT):
    return score.grade(one, rule, symbolic.verify)


def test_oracle_formats_are_rewarded_as_released_by_the_official_preset():
    for case in oracle_files.read("formats.json"):
        reward = grade(task(case["text"], case["ground_truth"]), OFFICIAL)
        wanted = case["official"]
        assert reward.total == pytest.approx(wanted["score"]), case
        assert (reward.accuracy, reward.format) == (wanted["acc_reward"], wanted["format_reward"])


def test_oracle_formats_earn_nothing_by_default_when_they_are_invalid():
    for case in oracle_files.read("formats.json"):
        reward = grade(task(case["text"], case["ground_truth"]))
        assert reward.format == float(case["format_ok"]), case
        if not case["format_ok"]:
            assert (reward.total, reward.accuracy, reward.reason) == (0, 0, score.Reason.FORMAT)


@pytest.mark.parametrize("rule", [STRICT, OFFICIAL])
@pytest.mark.parametrize(
    ("answer", "total", "reason"),
    [
        ("3", 1.0, score.Reason.CORRECT),
        ("4", 0.2, score.Reason.WRONG),
        ("3" + " " * 1030, 1.0, score.Reason.CORRECT),
        ("3" * 1023, 0.2, score.Reason.WRONG),
        ("3" * 1024, 0.2, score.Reason.TOO_LONG),
    ],
)
def test_reward_is_four_fifths_accuracy_and_one_fifth_format(rule, answer, total, reason):
    reward = grade(task(respond(answer)), rule)
    assert reward.total == pytest.approx(total) and reward.reason is reason


def test_an_empty_answer_is_invalid_by_default_and_well_formed_officially():
    assert grade(task(respond(" "))).reason is score.Reason.FORMAT
    reward = grade(task(respond(" ")), OFFICIAL)
    assert (reward.total, reward.reason) == (0.2, score.Reason.NO_ANSWER)


def test_a_response_without_an_end_token_earns_nothing_by_default():
    assert grade(task(respond("3"), ended=False)).total == 0
    assert grade(task(respond("3"), ended=False), OFFICIAL).total == 1


def test_weights_are_the_rule_s():
    rule = score.Rule(judge="strict", accuracy_weight=0.5, format_weight=0.25)
    assert grade(task(respond("3")), rule).total == 0.75
    assert grade(task(respond("4")), rule).total == 0.25


def test_equivalent_answers_count_unless_the_list_holds_the_empty_marker():
    assert grade(task(respond("0.5"), "7", equivalents=("3", "1/2"))).accuracy == 1
    assert grade(task(respond("0.5"), "7", equivalents=("1/2", "__EMPTY__"))).accuracy == 0
    assert grade(task(respond("7"), "7", equivalents=("__EMPTY__",))).accuracy == 1


@pytest.mark.parametrize("source", ["math-77k", "visual_logic-26k"])
def test_official_math_sources_use_extraction_and_equivalents(source):
    def accuracy(answer, truth, equivalents=()):
        one = task(respond(answer), truth, equivalents=equivalents, source=source)
        return grade(one, OFFICIAL).accuracy

    assert accuracy("x+1", "1+x") == 1
    assert accuracy("0.5", "7", ("\\frac{1}{2}",)) == 1
    assert accuracy("0.5", "7", ("\\frac{1}{2}", "__EMPTY__")) == 0
    assert accuracy("8", "7") == 0


def test_official_geometry_pays_format_and_accuracy_apart():
    def reward(response):
        return grade(task(response, source=GEOMETRY), OFFICIAL)

    loose = "so <caption></caption> and <think></think> and <answer>3</answer> done"
    assert reward(loose).total == pytest.approx(1.0)
    assert reward("<answer>3</answer>").total == pytest.approx(0.9)
    assert reward(respond("4")).total == pytest.approx(0.1)
    assert reward("nothing").total == 0


def test_a_failed_judge_earns_nothing_by_default_and_the_format_officially():
    one = task(respond("3"))
    for reason in (score.Reason.TIMEOUT, score.Reason.ERROR):
        assert score.reward(one, STRICT, reason).total == 0
        assert score.reward(one, OFFICIAL, reason).total == 0.2


def test_reasons_are_counted_with_an_entry_for_each():
    rewards = [grade(task(respond(answer))) for answer in ("3", "4", "5", "")]
    assert score.count_reasons(rewards) == {
        "correct": 1,
        "wrong": 2,
        "format": 1,
        "no_answer": 0,
        "too_long": 0,
        "timeout": 0,
        "error": 0,
    }


def test_an_unknown_judge_is_refused():
    with pytest.raises(errors.InputError, match="judge must be"):
        score.Rule(judge="lenient", accuracy_weight=0.8, format_weight=0.2)
