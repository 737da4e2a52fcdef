"""The processes that judge answers; without JAX, for commands that need no accelerator."""

import dataclasses

from prism_jax import configuration
from prism_jax.rewards import score, workers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes(configuration.Section):
    """The processes that judge answers; see `rewards.workers.JudgePool`."""

    num_workers: int = configuration.free()
    deadline_seconds: float
    memory_bytes: int  # of a worker

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 1, "num_workers", "memory_bytes")

    def start(self, rule: score.Rule) -> workers.JudgePool:
        """Start the processes, which judge by this rule."""
        return workers.JudgePool(
            rule,
            num_workers=self.num_workers,
            deadline_seconds=self.deadline_seconds,
            memory_bytes=self.memory_bytes,
        )

    def start_for_accuracy(self, judge: score.Judge) -> workers.JudgePool:
        """Start the processes where only the accuracy and the format of a reward are read."""
        return self.start(score.Rule(judge=judge, accuracy_weight=1.0, format_weight=0.0))
