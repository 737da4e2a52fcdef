"""Groups of responses to one prompt each, and what a step of RLVR leaves for the next one.

Dynamic sampling (DAPO) learns from prompts whose responses differ in accuracy and draws further
prompts until a step is full. Groups that are left over are kept for the next step:

    step 1   draw a b c d e f    a, c, d, f vary    learn from a c d    keep f
    step 2   draw g h i j k l    h, k vary          learn from f h k

`Feed` holds them, and what else a step leaves, beside the position of the prompts: both are saved
with a checkpoint, so a run that goes on is the one that was not interrupted, bit for bit.
Source: arXiv 2503.14476 §3.2; PRISM verl/recipe/dapo/dapo_ray_trainer.py:281, which throws away
what is left over.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models.inputs import Example
from prism_jax import errors, metrics
from prism_jax.data import records
from prism_jax.policy import rollouts
from prism_jax.rewards import score, tags
from prism_jax.stages.rlvr import config as rlvr_config

Json = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Hold prompts that are drawn from together."""

    indices: list[int]  # of the rows
    rows: list[records.PromptRow]
    prompts: list[Example]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """Hold one response with what it earned."""

    tokens: np.ndarray  # int32[n]
    logprobs: np.ndarray  # float32[n]  of the sampler
    segments: tags.Segments
    reward: score.Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Hold the responses to one prompt."""

    index: int  # of the row
    row: records.PromptRow
    prompt: Example
    responses: tuple[Response, ...]
    step: int  # in which they were drawn


def make(
    asked: Prompts, drawn: rollouts.Responses, rewards: Sequence[score.Reward], *, step: int
) -> list[Group]:
    """Return the responses prompt by prompt."""
    rollout = drawn.rollout
    each = len(rewards) // len(asked.rows)
    found = [
        Response(
            tokens=rollout.tokens[number, :length],
            logprobs=rollout.logprobs[number, :length],
            segments=drawn.segments[number],
            reward=rewards[number],
        )
        for number, length in enumerate(rollout.lengths)
    ]
    return [
        Group(
            index=asked.indices[number],
            row=asked.rows[number],
            prompt=asked.prompts[number],
            responses=tuple(found[number * each : (number + 1) * each]),
            step=step,
        )
        for number in range(len(asked.rows))
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filled:
    """Hold the groups of a step and what is left over."""

    groups: list[Group]
    surplus: list[Group]  # those that the next step may use
    num_drawn: int  # prompts drawn in this step
    num_varying: int  # of them
    num_generations: int


def fill(
    kept: Sequence[Group],
    draw: Callable[[int], list[Group]],
    options: rlvr_config.Groups,
    *,
    num_prompts: int,
    step: int,
) -> Filled:
    """Return a full step of groups that vary, the oldest first.

    Args:
      kept: left over by the step before.
      draw: draws the groups of the next prompts; told how many times it was called in this step.

    Raises:
      InputError: `max_generations` were not enough, and the configuration says "error".
    """
    found = list(kept)
    num_drawn, num_generations = 0, 0
    while len(found) < num_prompts and num_generations < options.max_generations:
        drawn = draw(num_generations)
        num_generations += 1
        num_drawn += len(drawn)
        found += [group for group in drawn if _varies(group, options.keep)]
    if len(found) < num_prompts and options.when_short == "error":
        raise errors.InputError(
            f"step {step}: the {options.keep} of the responses varies for {len(found)} prompts of "
            f"{num_drawn} in groups.max_generations = {num_generations}, {num_prompts} are needed; "
            "give other prompts or more responses, or set config.groups.when_short='train'"
        )
    surplus = found[num_prompts:]
    return Filled(
        groups=found[:num_prompts],
        surplus=[one for one in surplus if step + 1 - one.step <= options.surplus_steps],
        num_drawn=num_drawn,
        num_varying=len(found) - len(kept),
        num_generations=num_generations,
    )


def told_of(filled: Filled, *, step: int) -> metrics.Metrics:
    """Return how many prompts vary, and how many of those learnt from are left from steps before.

    Rewards and lengths in the log are those of all prompts that were drawn, kept or not.
    """
    older = [group.step < step for group in filled.groups]
    told = {
        "rollout/generations": metrics.mean([filled.num_generations]),
        "rollout/surplus_prompts": metrics.mean([len(filled.surplus)]),
        "rollout/trained_prompts": metrics.mean([len(filled.groups)]),
        "rollout/older_prompts_fraction": metrics.mean(older),
    }
    if filled.num_drawn:
        varying = [filled.num_varying / filled.num_drawn]
        told["rollout/varying_prompts_fraction"] = metrics.mean(varying)
    return told


def _varies(group: Group, keep: str) -> bool:
    rewards = [response.reward for response in group.responses]
    values = {one.accuracy if keep == "accuracy" else one.total for one in rewards}
    return len(values) > 1
