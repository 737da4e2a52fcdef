"""The judge of answers: how it is configured, and how the hosts of a job share it."""

import dataclasses
from collections.abc import Sequence

import jax

from prism_jax import configuration, errors, progress, user_functions
from prism_jax.rewards import custom, score, workers
from prism_jax.setup import agreement, judge_processes

_FIELD = "config.rewards.custom"


class SharedJudge:
    """The judge of a job of several processes: each response has one owner, who rewards it.

    The rewards are gathered, so that a host that is slow, or lets a task run out of time, cannot
    give one response two rewards. Every process asks about the same responses at the same time.
    """

    def __init__(self, pool: workers.JudgePool | custom.CustomPool):
        self._pool = pool
        # The names of the parts that a function of the user's returned first; all must be the same.
        self._names: frozenset[str] | None = None

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
        values = agreement.gather_parts(
            [dataclasses.asdict(reward) for reward in graded], len(tasks)
        )
        rewards = [
            score.Reward(**value | {"reason": score.Reason(value["reason"])}) for value in values
        ]
        return self._check(tasks, rewards) if any(r.is_custom for r in rewards) else rewards

    def _check(
        self, tasks: Sequence[score.Task], rewards: Sequence[score.Reward]
    ) -> list[score.Reward]:
        """Return the rewards of a function of the user's, and name its failures.

        Raises:
          InputError: it has failed on every response so far.
        """
        checked = [self._with_same_parts(reward) for reward in rewards]
        failed = [n for n, reward in enumerate(checked) if reward.detail is not None]
        if failed:
            first, row = checked[failed[0]], tasks[failed[0]].row or {}
            line = (
                f"{_FIELD}: no reward for {len(failed)} of {len(checked)} responses; the first, to "
                f"{row.get('id')}: {first.reason.value}: {first.detail}"
            )
            if self._names is None:
                raise errors.InputError(line)
            if jax.process_index() == 0:
                progress.say(line)
        return checked

    def _with_same_parts(self, reward: score.Reward) -> score.Reward:
        if reward.parts is None:
            return reward
        names = frozenset(reward.parts)
        if self._names is None:
            self._names = names
        if names == self._names:
            return reward
        here, before = (", ".join(sorted(some)) for some in (names, self._names))
        detail = f"returned the parts {here}, before {before}; they must be the same"
        return custom.failure(reward.format, score.Reason.ERROR, detail)

    def verdicts(self, questions: Sequence[score.Question]) -> list[score.Reason]:
        """Judge questions, in order."""
        judged = self._pool.verdicts(agreement.own_part(list(questions)))
        verdicts = agreement.gather_parts([reason.value for reason in judged], len(questions))
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
    # FILE.py:FUNCTION of the user's, in place of the judge; see `rewards.custom`. The file may
    # move: its digest is compared.
    custom: str | None = configuration.free()
    accuracy_weight: float
    format_weight: float

    def digests(self) -> dict[str, str]:
        """Return the digest of the function's file by the field that names it; {} without one.

        Raises:
          InputError: there is no such function.
        """
        if self.custom is None:
            return {}
        return {"rewards.custom": user_functions.find(self.custom, field=_FIELD).digest}

    def open_judge(self) -> SharedJudge:
        """Start the judge's processes."""
        rule = score.Rule(
            judge=self.judge,
            accuracy_weight=self.accuracy_weight,
            format_weight=self.format_weight,
        )
        if self.custom is None:
            return SharedJudge(self.start(rule))
        return SharedJudge(
            custom.CustomPool(
                user_functions.find(self.custom, field=_FIELD),
                rule,
                num_workers=self.num_workers,
                deadline_seconds=self.deadline_seconds,
                memory_bytes=self.memory_bytes,
            )
        )
