"""Turn a response and its ground truth into a reward: 0.8 accuracy + 0.2 format.

A response with an invalid format earns nothing. Each reward has a reason, which distinguishes a
run whose judge fails from a run whose policy fails.

Source: PRISM verl/verl/utils/reward_score/mm_gad_no_llm.py:354-378.
"""

import collections
import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from prism_jax import errors
from prism_jax.rewards import answer, answer_official, tags

Judge = Literal["strict", "official"]

# The released dispatch on a row's data source.
# Source: PRISM verl/verl/utils/reward_score/__init__.py.
EXTRACTION_SOURCES = frozenset({"math-77k", "visual_logic-26k"})
GEOMETRY_SOURCE = "hiyouga/geometry3k"
_GEOMETRY_FORMAT_WEIGHT = 0.1


class Reason(enum.StrEnum):
    """The reasons of a reward."""

    CORRECT = "correct"
    WRONG = "wrong"
    FORMAT = "format"
    NO_ANSWER = "no_answer"
    TOO_LONG = "too_long"
    TIMEOUT = "timeout"
    ERROR = "error"
    SCORED = "scored"  # by a function of the user's, see `custom`


# The reasons of the judge, and those of a function of the user's.
JUDGED = tuple(reason for reason in Reason if reason is not Reason.SCORED)
CUSTOM = (Reason.SCORED, Reason.TIMEOUT, Reason.ERROR)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """The rule by which responses are rewarded.

    judge: `strict` compares by `answer.py` after the strict format gate; a response that never
    ended is invalid. `official` reproduces the released rewards: the released gate and judge, for
    `math-77k` and `visual_logic-26k` math-verify on the answer and its equivalents, for
    `hiyouga/geometry3k` 0.9 accuracy + 0.1 of the loose format, each paid without the other.
    (For it the released code judges by `mathruler`; here the released rules do.)
    """

    judge: Judge
    accuracy_weight: float
    format_weight: float

    def __post_init__(self) -> None:
        if self.judge not in ("strict", "official"):
            raise errors.InputError(
                f"rewards.judge must be 'strict' or 'official', got {self.judge!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A response (its text without the end token) and the truth to judge it against."""

    response: str
    ended: bool
    ground_truth: str | None  # a function of the user's needs none
    equivalent_answers: tuple[str, ...]
    data_source: str
    row: Mapping[str, Any] | None = None  # JSON values for a function of the user's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward and its parts; accuracy and format of the judge are 0 or 1."""

    total: float
    accuracy: float
    format: float
    reason: Reason
    parts: Mapping[str, float] | None = None  # from a function of the user's
    detail: str | None = None  # why that function gave no reward

    @property
    def is_custom(self) -> bool:
        """Return whether a function of the user's gave it."""
        return self.parts is not None or self.detail is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """All that the accuracy of a response depends on; equal questions have equal verdicts.

    judge: besides the rewards' rules `rounded`, by which a benchmark compares values: answer and
    one of the truths are equal to two decimal places.
    """

    answer: str
    ground_truth: str
    equivalent_answers: tuple[str, ...]
    data_source: str
    judge: Judge | Literal["rounded"]


def gate_of(task: Task, rule: Rule) -> tags.Gate:
    """Return the format rule that applies to a task."""
    if rule.judge == "strict":
        return "strict"
    return "geo3k" if task.data_source == GEOMETRY_SOURCE else "official"


def screen(task: Task, rule: Rule) -> Reason | Question:
    """Return the question for the judge, or the reason if no judge is needed."""
    given = tags.answer_text(task.response)
    pays_apart = rule.judge == "official" and task.data_source == GEOMETRY_SOURCE
    if not pays_apart and not format_ok(task, rule):
        return Reason.FORMAT
    if not given:
        return Reason.NO_ANSWER
    if len(given) >= answer.MAX_CHARS:
        return Reason.TOO_LONG
    return Question(
        answer=given,
        ground_truth=task.ground_truth,
        equivalent_answers=task.equivalent_answers,
        data_source=task.data_source,
        judge=rule.judge,
    )


def judge(question: Question, mathematics: answer_official.Mathematics) -> Reason:
    """Return the judge's verdict. Exceptions of `mathematics` pass through."""
    if question.judge == "strict":
        equivalents = _accepted(question.equivalent_answers)
        right = any(
            answer.is_correct(question.answer, truth, mathematics)
            for truth in (question.ground_truth, *equivalents)
        )
    elif question.judge == "rounded":
        truths = (question.ground_truth, *question.equivalent_answers)
        right = any(mathematics("rounded", question.answer, truth) for truth in truths)
    elif question.data_source in EXTRACTION_SOURCES:
        right = answer_official.is_correct_by_extraction(
            question.answer, question.ground_truth, question.equivalent_answers, mathematics
        )
    else:
        right = answer_official.is_correct(question.answer, question.ground_truth, mathematics)
    return Reason.CORRECT if right else Reason.WRONG


def grade(task: Task, rule: Rule, mathematics: answer_official.Mathematics) -> Reward:
    """Reward a response in this process, without a deadline."""
    screened = screen(task, rule)
    reason = judge(screened, mathematics) if isinstance(screened, Question) else screened
    return reward(task, rule, reason)


def reward(task: Task, rule: Rule, reason: Reason) -> Reward:
    """Return the reward of a task whose verdict is `reason`.

    If the judge timed out or failed, the reward is 0; the released judge still pays for the format
    of such a response.
    """
    accuracy = float(reason is Reason.CORRECT)
    form = float(format_ok(task, rule))
    if rule.judge == "official" and task.data_source == GEOMETRY_SOURCE:
        total = (1.0 - _GEOMETRY_FORMAT_WEIGHT) * accuracy + _GEOMETRY_FORMAT_WEIGHT * form
    else:
        total = rule.accuracy_weight * accuracy + rule.format_weight * form
    if rule.judge == "strict" and reason in (Reason.TIMEOUT, Reason.ERROR):
        total = 0.0
    return Reward(total=total, accuracy=accuracy, format=form, reason=reason)


def count_reasons(rewards: Iterable[Reward]) -> dict[str, int]:
    """Count rewards by reason; all reasons of the judge, or of the function, have an entry."""
    rewards = list(rewards)
    counts = collections.Counter(reward.reason for reward in rewards)
    is_custom = any(reward.is_custom for reward in rewards)
    return {reason.value: counts[reason] for reason in (CUSTOM if is_custom else JUDGED)}


def format_ok(task: Task, rule: Rule) -> bool:
    """Return whether a response has the format of the rule's gate."""
    ended = task.ended or rule.judge == "official"
    return ended and tags.format_ok(task.response, gate=gate_of(task, rule))


def _accepted(equivalent_answers: tuple[str, ...]) -> tuple[str, ...]:
    """Return the equivalent answers that count: none if the list has the empty marker.

    Source: PRISM verl/verl/utils/reward_score/math_verify_with_format.py:89.
    """
    return () if answer_official.NO_EQUIVALENT in equivalent_answers else equivalent_answers
