"""Reward responses by a function of the user's: `rewards.custom = FILE.py:FUNCTION`.

    def FUNCTION(sample: dict) -> float | dict[str, float]

It is called in processes that can be killed, once a response, malformed and cut ones included.
`sample` has JSON values alone:

    response            its text, without the end token
    ended               False: the limit of tokens cut it
    format_ok           it has the format of the gate of `rewards.judge`
    answer              the text in <answer>, "" without one
    ground_truth        of the row, None without one
    equivalent_answers  a list
    data_source         "" without one
    id                  of the row
    prompt              a list of {"role", "content"}
    images              a list of {"sha256", "width_pixels", "height_pixels"}
    extra_info          a dict

It returns a number in [0, 1], or a dict of them: `total`, perhaps `accuracy` (without it the total
counts as the accuracy), and parts of other names, which are logged. The reward is

    accuracy_weight * total + format_weight * format_ok

An error, a value outside the contract or a call beyond the deadline gives the reward 0 with the
reason `error` or `timeout` and a text that says why.
"""

from collections.abc import Sequence

from prism_jax import user_functions
from prism_jax.rewards import pool, score, tags


class CustomPool:
    """A function of the user's as judge of responses; see `workers.JudgePool`."""

    def __init__(
        self,
        function: user_functions.UserFunction,
        rule: score.Rule,
        *,
        num_workers: int,
        deadline_seconds: float,
        memory_bytes: int,
    ):
        self._rule = rule
        module = "prism_jax.rewards.custom_process"
        limits = [str(deadline_seconds), str(memory_bytes)]
        self.pool = pool.Pool(
            [module, function.path, function.name, *limits],
            num_workers=num_workers,
            deadline_seconds=deadline_seconds,
        )

    @property
    def num_restarts(self) -> int:
        """Return how many processes were killed or died."""
        return self.pool.num_restarts

    def close(self) -> None:
        """End the processes; a second call does nothing."""
        self.pool.close()

    def grade(self, tasks: Sequence[score.Task]) -> list[score.Reward]:
        """Reward tasks, in order.

        Raises:
          InputError: the file cannot be loaded.
        """
        replies = self.pool.ask([self._sample(task) for task in tasks])
        return [self._reward(task, reply) for task, reply in zip(tasks, replies, strict=True)]

    def _sample(self, task: score.Task) -> dict:
        return {
            "response": task.response,
            "ended": task.ended,
            "format_ok": score.format_ok(task, self._rule),
            "answer": tags.answer_text(task.response),
            "ground_truth": task.ground_truth,
            "equivalent_answers": list(task.equivalent_answers),
            "data_source": task.data_source,
            **(task.row or {}),
        }

    def _reward(self, task: score.Task, reply: dict) -> score.Reward:
        form = float(score.format_ok(task, self._rule))
        reason = score.Reason(reply["reason"])
        if reason is not score.Reason.SCORED:
            return failure(form, reason, reply["detail"])
        parts = reply["parts"]
        return score.Reward(
            total=self._rule.accuracy_weight * parts["total"] + self._rule.format_weight * form,
            accuracy=parts.get("accuracy", parts["total"]),
            format=form,
            reason=reason,
            parts=parts,
        )


def failure(form: float, reason: score.Reason, detail: str) -> score.Reward:
    """Return the reward of a response for which the function gave none."""
    return score.Reward(total=0.0, accuracy=0.0, format=form, reason=reason, detail=detail)
