"""Reward batches of responses: fast rules here, mathematics in processes that can be killed.

Most answers are decided in this process by rules of bounded cost. Only expressions that need
math-verify go to a worker of `pool.Pool`. Where it exceeds the deadline (`9^{9^9}`) or dies, the
task earns nothing and is counted.
"""

import dataclasses
from collections.abc import Sequence

from prism_jax.rewards import pool, score


class _NeedsMathematicsError(Exception):
    """A task that the fast rules cannot decide."""


def _defer(method: str, answer: str, truth: str) -> bool:
    raise _NeedsMathematicsError


def _judge_here(question: score.Question) -> score.Reason | None:
    try:
        return score.judge(question, _defer)
    except Exception:
        # Mathematics is needed, or a rule failed: then the worker fails again and reports it.
        return None


class JudgePool:
    """A judge of responses with a fixed number of judging processes.

    Args:
        rule: of the rewards.
        num_workers: judging processes; they start at once, in the background.
        deadline_seconds: wall time for a task in a worker.
        memory_bytes: address space of a worker (`RLIMIT_AS`); beyond it a task is an error.
        module: the program of a worker.
    """

    def __init__(
        self,
        rule: score.Rule,
        *,
        num_workers: int,
        deadline_seconds: float,
        memory_bytes: int,
        module: str = "prism_jax.rewards.judge_process",
    ):
        self._rule = rule
        self.pool = pool.Pool(
            [module, str(deadline_seconds), str(memory_bytes)],
            num_workers=num_workers,
            deadline_seconds=deadline_seconds,
        )

    def __enter__(self) -> "JudgePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_restarts(self) -> int:
        """Return how many processes were killed or died."""
        return self.pool.num_restarts

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        self.pool.close()

    def grade(self, tasks: Sequence[score.Task]) -> list[score.Reward]:
        """Reward tasks, in order. Equal answers to equal truths are judged once.

        Raises:
          ValueError: a task has no ground truth.
        """
        missing = [number for number, task in enumerate(tasks) if task.ground_truth is None]
        if missing:
            raise ValueError(f"tasks without ground truth cannot be judged: {missing[:5]}")
        screened = [score.screen(task, self._rule) for task in tasks]
        questions = [item for item in screened if isinstance(item, score.Question)]
        verdicts = dict(zip(questions, self.verdicts(questions), strict=True))
        reasons = [item if isinstance(item, score.Reason) else verdicts[item] for item in screened]
        return [
            score.reward(task, self._rule, reason)
            for task, reason in zip(tasks, reasons, strict=True)
        ]

    def verdicts(self, questions: Sequence[score.Question]) -> list[score.Reason]:
        """Judge questions, in order. Equal questions are judged once."""
        reasons = {question: _judge_here(question) for question in dict.fromkeys(questions)}
        waiting = [question for question, reason in reasons.items() if reason is None]
        replies = self.pool.ask([dataclasses.asdict(question) for question in waiting])
        reasons |= zip(waiting, [score.Reason(reply["reason"]) for reply in replies], strict=True)
        return [reasons[question] for question in questions]
