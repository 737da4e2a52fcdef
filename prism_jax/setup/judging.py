"""The judge of answers: how it is configured, and how the hosts of a job share it."""

import dataclasses
from collections.abc import Sequence

from prism_jax.rewards import score, workers
from prism_jax.setup import agreement, judge_processes


class SharedJudge:
    """The judge of a job of several processes: each response has one owner, who rewards it.

    The rewards are gathered, so that a host that is slow, or lets a task run out of time, cannot
    give one response two rewards. Every process asks about the same responses at the same time.
    """

    def __init__(self, pool: workers.JudgePool):
        self._pool = pool

    def __enter__(self) -> "SharedJudge":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    @property
    def num_restarts(self) -> int:
        """Return how many judging processes of this host were killed or died."""
        return self._pool.num_restarts

    def grade(self, tasks: Sequence[score.Task]) -> list[score.Reward]:
        """Reward tasks, in order."""
        graded = self._pool.grade(agreement.own_part(list(tasks)))
        rewards = [[one.total, one.accuracy, one.format, one.reason.value] for one in graded]
        return [
            score.Reward(total=total, accuracy=accuracy, format=form, reason=score.Reason(reason))
            for total, accuracy, form, reason in agreement.gather_parts(rewards, len(tasks))
        ]

    def verdicts(self, questions: Sequence[score.Question]) -> list[score.Reason]:
        """Judge questions, in order."""
        own = self._pool.verdicts(agreement.own_part(list(questions)))
        verdicts = agreement.gather_parts([reason.value for reason in own], len(questions))
        return [score.Reason(verdict) for verdict in verdicts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge(judge_processes.Processes):
    """The judge where accuracy alone counts."""

    rule: score.Judge

    def open(self) -> SharedJudge:
        """Start the judge's processes."""
        return SharedJudge(self.start_for_accuracy(self.rule))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards(judge_processes.Processes):
    """The judge, and the weights of accuracy and format in a reward; see `rewards.score.Rule`."""

    judge: score.Judge
    accuracy_weight: float
    format_weight: float

    def open_judge(self) -> SharedJudge:
        """Start the judge's processes."""
        rule = score.Rule(
            judge=self.judge,
            accuracy_weight=self.accuracy_weight,
            format_weight=self.format_weight,
        )
        return SharedJudge(self.start(rule))
