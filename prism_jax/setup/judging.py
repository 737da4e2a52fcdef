"""The judge of responses: how it is configured and its processes are started."""

import dataclasses
from typing import Literal

from prism_jax import configuration
from prism_jax.rewards import score, workers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards(configuration.Section):
    """Say how responses are judged; see `rewards.score.Rule` and `rewards.workers.JudgePool`."""

    judge: Literal["strict", "official"]
    accuracy_weight: float
    format_weight: float
    num_workers: int
    deadline_seconds: float
    memory_bytes: int  # of a worker

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 1, "num_workers", "memory_bytes")

    def open_judge(self) -> workers.JudgePool:
        """Start the judging processes."""
        rule = score.Rule(
            judge=self.judge,
            accuracy_weight=self.accuracy_weight,
            format_weight=self.format_weight,
        )
        return workers.JudgePool(
            rule,
            num_workers=self.num_workers,
            deadline_seconds=self.deadline_seconds,
            memory_bytes=self.memory_bytes,
        )
