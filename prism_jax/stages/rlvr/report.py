"""The report of a step of RLVR: metrics, and the dump of its responses."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from prism_jax import metrics
from prism_jax.rewards import score
from prism_jax.running import dump as running_dump
from prism_jax.stages.rlvr import advantages as rlvr_advantages
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import groups as rlvr_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The dump of a step's responses, and the options that decide its metrics."""

    dump: running_dump.Dump
    overlong: rlvr_config.Overlong
    is_refilled: bool  # a step has any number of generations, and may leave groups over

    def __call__(
        self,
        step: int,
        filled: rlvr_groups.Filled,
        responses: rlvr_groups.StepResponses,
        penalties: np.ndarray,
        comparison: rlvr_advantages.Compared,
    ) -> metrics.Metrics:
        """Write the dump where it is due, and return metrics about groups and penalties.

        Args:
          step: number of this step, counted from 1.
        """
        self.dump.write(
            step,
            [group.row for group in filled.groups],
            [response.segments for response in responses.responses],
            _columns(responses, penalties, comparison, self.overlong),
        )
        logged = comparison.metrics
        if self.overlong.buffer_tokens is not None:
            logged = logged | {"reward/overlong_penalty_mean": metrics.mean(penalties)}
        # Metrics of options that are off are absent, never 0.
        if self.overlong.is_filtered:
            logged = logged | {"rollout/filtered_fraction": metrics.mean(~responses.ended)}
        return logged | of_groups(filled, step) if self.is_refilled else logged


def of_rewards(rewards: Sequence[score.Reward], *, num_responses: int) -> metrics.Metrics:
    """Return mean rewards, the share of each reason, and the share of groups without variation."""
    groups = np.array([reward.total for reward in rewards]).reshape(-1, num_responses)
    counts = score.count_reasons(rewards)
    return {
        "reward/total_mean": metrics.mean(groups),
        "reward/accuracy_mean": metrics.mean([reward.accuracy for reward in rewards]),
        "reward/format_mean": metrics.mean([reward.format for reward in rewards]),
        "reward/flat_groups_fraction": metrics.mean(np.ptp(groups, axis=1) == 0),
        **{
            f"reward/reason_{reason}_fraction": metrics.mean([count / len(rewards)])
            for reason, count in counts.items()
        },
        **_parts(rewards),
    }


def _parts(rewards: Sequence[score.Reward]) -> metrics.Metrics:
    """Return the means of the parts that a function of the user's returned."""
    parts = [reward.parts for reward in rewards if reward.parts is not None]
    if not parts:
        return {}
    return {
        f"reward/part_{name}_mean": metrics.mean([values[name] for values in parts])
        for name in sorted(parts[0])
    }


def of_groups(filled: rlvr_groups.Filled, step: int) -> metrics.Metrics:
    """Return the share of prompts that vary, and of those learned from that are carried over.

    Rewards and lengths in the log are those of all responses, learned from or not.
    """
    older = [group.step < step for group in filled.groups]
    logged = {
        "rollout/generations": metrics.mean([filled.num_generations]),
        "rollout/surplus_prompts": metrics.mean([len(filled.surplus)]),
        "rollout/trained_prompts": metrics.mean([len(filled.groups)]),
        "rollout/older_prompts_fraction": metrics.mean(older),
    }
    if filled.num_drawn:
        # A step that the carry fills draws nothing, and has no share.
        varying = [filled.num_varying / filled.num_drawn]
        logged["rollout/varying_prompts_fraction"] = metrics.mean(varying)
    return logged


def merge_generations(generations: Sequence[metrics.Metrics]) -> metrics.Metrics:
    """Merge the metrics of a step's generations; times are added up."""
    if not generations:
        return {}
    merged = generations[0]
    for logged in generations[1:]:
        # The parts of rewards are absent where no response got one.
        merged = merged | {
            name: merged[name].merge(value) if name in merged else value
            for name, value in logged.items()
        }
    return {
        # A step's time is that of all its generations; every other metric is a mean over them.
        name: metrics.Mean(total=m.total, weight=np.float32(1)) if "time/" in name else m
        for name, m in merged.items()
    }


def _columns(
    responses: rlvr_groups.StepResponses,
    penalties: np.ndarray,
    comparison: rlvr_advantages.Compared,
    overlong: rlvr_config.Overlong,
) -> dict[str, list[Any]]:
    """Return the dump's columns besides the text; of token advantages the mean."""
    advantages = comparison.advantages
    if advantages.ndim == 2:
        # A dump has one number a response.
        advantages = advantages.sum(-1) / np.maximum(responses.lengths, 1)
    rewards = [response.reward for response in responses.responses]
    columns = {
        "reward": [np.float32(reward.total) for reward in rewards],
        "accuracy": [reward.accuracy for reward in rewards],
        "reason": [reward.reason.value for reward in rewards],
        "advantage": list(advantages),
    }
    if overlong.buffer_tokens is not None:
        columns["overlong_penalty"] = list(penalties)
    return columns
