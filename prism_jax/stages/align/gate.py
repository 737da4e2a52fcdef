"""The judge's word on the teacher: from which prompts something is learned, and how.

    teacher_gate   a prompt whose teacher's answer is wrong
    off            counts as any other
    drop           no pair, and the advantage 0 on all its responses
    verify         no pair, and the policy learns from the judge: the accuracy normalised within
                   the group, less the penalty of malformed responses

Black-box teachers err, and a discriminator puts a wrong teacher above every right response.
Source: arXiv 2609.02998 (TGOPD), where a verified teacher gates distillation with logits.
"""

import numpy as np

from prism_jax import metrics
from prism_jax.discriminator import segments
from prism_jax.policy import responses as policy_responses
from prism_jax.rewards import score
from prism_jax.stages.align import feed as align_feed


class TeacherGate:
    """The teachers' answers, judged once each."""

    def __init__(self, judge: policy_responses.Judge):
        self._judge = judge
        self._known: dict[score.Task, bool] = {}

    def __call__(self, prompts: align_feed.Prompts) -> np.ndarray:
        """Return bool[N], whether the teacher's answer to each prompt is right."""
        tasks = [
            score.Task(
                response=segments.teacher_text(row).response,
                # Of a teacher only the text is known, not whether a limit cut it.
                ended=True,
                ground_truth=row.ground_truth,
                equivalent_answers=tuple(row.equivalent_answers),
                data_source=row.data_source or "",
            )
            for row in prompts.rows
        ]
        # A prompt comes again in every epoch, with the same answer of its teacher.
        new = [task for task in dict.fromkeys(tasks) if task not in self._known]
        if new:
            rewards = self._judge.grade(new)
            self._known |= {
                task: reward.accuracy > 0 for task, reward in zip(new, rewards, strict=True)
            }
        return np.array([self._known[task] for task in tasks])


def logged(is_trusted: np.ndarray | None) -> metrics.Metrics:
    """Return the share of prompts whose teacher is right; nothing where no teacher is judged."""
    if is_trusted is None:
        return {}
    return {"reward/teacher_accuracy_mean": metrics.mean(is_trusted)}
