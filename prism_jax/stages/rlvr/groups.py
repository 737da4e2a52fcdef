"""Groups of responses, each to one prompt, and how a step is filled with groups that vary.

Dynamic sampling (DAPO) learns from prompts whose responses differ in accuracy and draws further
prompts until a step is full. Groups that are left over are carried to the next step:

    step 1   draw a b c d e f    a, c, d, f vary    learn from a c d    carry f
    step 2   draw g h i j k l    h, k vary          learn from f h k

`feed.Feed` holds the carry beside the position of the prompts. Both are saved with a checkpoint, so
a run that is resumed equals the run that was not interrupted, bit for bit.
Source: arXiv 2503.14476 §3.2; PRISM verl/recipe/dapo/dapo_ray_trainer.py:281, which throws
the rest away.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models.inputs import Example
from prism_jax import errors
from prism_jax.data import records
from prism_jax.policy import rollouts
from prism_jax.rewards import score, tags
from prism_jax.stages.rlvr import config as rlvr_config

Json = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a generation, to which the policy responds together."""

    indices: list[int]  # of the rows
    rows: list[records.PromptRow]
    prompts: list[Example]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """A response and its reward."""

    tokens: np.ndarray  # int32[n]
    logprobs: np.ndarray  # float32[n]  of the sampler
    segments: tags.Segments
    reward: score.Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The responses to one prompt."""

    index: int  # of the row
    row: records.PromptRow
    prompt: Example
    responses: tuple[Response, ...]
    step: int  # in which the policy responded


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResponses:
    """The responses of a step's groups, an entry each, those to one prompt side by side."""

    responses: list[Response]
    lengths: np.ndarray  # int32[responses]  tokens
    rewards: np.ndarray  # float32[responses]  of the judge
    prompt_id: np.ndarray  # int32[responses]  number of the group
    ended: np.ndarray  # bool[responses]  not cut by the length limit
    is_older: np.ndarray  # bool[responses]  of an earlier step, from the policy as it was then


def make(
    prompts: Prompts, responses: rollouts.Responses, rewards: Sequence[score.Reward], *, step: int
) -> list[Group]:
    """Return the responses prompt by prompt."""
    rollout = responses.rollout
    num_responses = len(rewards) // len(prompts.rows)
    rewarded = [
        Response(
            # Padding is cut off, since groups wait for later steps and are saved with checkpoints.
            tokens=rollout.tokens[number, :length],
            logprobs=rollout.logprobs[number, :length],
            segments=responses.segments[number],
            reward=rewards[number],
        )
        for number, length in enumerate(rollout.lengths)
    ]
    return [
        Group(
            index=prompts.indices[number],
            row=prompts.rows[number],
            prompt=prompts.prompts[number],
            responses=tuple(rewarded[number * num_responses : (number + 1) * num_responses]),
            step=step,
        )
        for number in range(len(prompts.rows))
    ]


def flatten(groups: Sequence[Group], *, step: int) -> StepResponses:
    """Return the responses of groups, from which the step of this number learns."""
    pairs = [(number, response) for number, g in enumerate(groups) for response in g.responses]
    responses = [response for _, response in pairs]
    return StepResponses(
        responses=responses,
        lengths=np.array([len(response.tokens) for response in responses], np.int32),
        rewards=np.array([response.reward.total for response in responses], np.float32),
        prompt_id=np.array([number for number, _ in pairs], np.int32),
        ended=np.array([response.segments.ended for response in responses], bool),
        is_older=np.array([groups[number].step < step for number, _ in pairs], bool),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filled:
    """The groups of a step, and those that are left over."""

    groups: list[Group]
    surplus: list[Group]  # those that the next step may use
    num_drawn: int  # prompts of this step's generations
    num_varying: int  # of them
    num_generations: int


def take_all(groups: Sequence[Group]) -> Filled:
    """Return a step that learns from all groups of its only generation."""
    return Filled(
        groups=list(groups),
        surplus=[],
        num_drawn=len(groups),
        num_varying=len(groups),
        num_generations=1,
    )


def fill(
    carried: Sequence[Group],
    generate: Callable[[int], list[Group]],
    options: rlvr_config.Groups,
    *,
    num_prompts: int,
    step: int,
) -> Filled:
    """Return a full step of groups that vary, the oldest first.

    Args:
      carried: left over by the step before.
      generate: (number of the generation in this step) -> the groups of the next prompts.

    Raises:
      InputError: `max_generations` were not enough, and the configuration says "error".
    """
    # The oldest come first: in the next step they may be too old.
    varying = list(carried)
    num_drawn, num_generations = 0, 0
    # Bounded: a policy that solves every prompt, or none, would never fill the step.
    while len(varying) < num_prompts and num_generations < options.max_generations:
        groups = generate(num_generations)
        num_generations += 1
        num_drawn += len(groups)
        varying += [group for group in groups if _varies(group, options.keep)]
    if len(varying) < num_prompts and options.when_short == "error":
        raise errors.InputError(
            f"step {step}: the {options.keep} of the responses varies for {len(varying)} prompts "
            f"of {num_drawn} in groups.max_generations = {num_generations}, {num_prompts} are "
            "needed; give other prompts or more responses, or set config.groups.when_short='train'"
        )
    # Groups beyond that age are thrown away: the policy has moved too far from the one that drew
    # them for a clipped ratio to mean much.
    surplus = [g for g in varying[num_prompts:] if step + 1 - g.step <= options.surplus_steps]
    return Filled(
        groups=varying[:num_prompts],
        surplus=surplus,
        num_drawn=num_drawn,
        num_varying=len(varying) - len(carried),
        num_generations=num_generations,
    )


def _varies(group: Group, keep: str) -> bool:
    rewards = [response.reward for response in group.responses]
    values = {reward.accuracy if keep == "accuracy" else reward.total for reward in rewards}
    # However little they differ: the advantage divides by the group's deviation.
    return len(values) > 1
