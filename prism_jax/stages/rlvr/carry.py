"""The carry from a step of RLVR to the next, and its form in a checkpoint."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from prism_jax.data import encode as data_encode
from prism_jax.data import processor
from prism_jax.policy import responses as policy_responses
from prism_jax.policy import saved as saved_lib
from prism_jax.rewards import score, tags
from prism_jax.rollout import engine
from prism_jax.setup import prompts as prompts_lib
from prism_jax.stages.rlvr import groups as rlvr_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """The state of a run besides its policy and the position of its prompts."""

    groups: tuple[rlvr_groups.Group, ...]  # groups that vary and were not needed
    coefficient: float | None  # of the KL in the reward; None: there is none


def encode(group: rlvr_groups.Group) -> dict[str, rlvr_groups.Json]:
    """Return a group as JSON values; its prompt is named by the number of the row."""
    responses = group.responses
    return {
        "index": group.index,
        "step": group.step,
        "lengths": [len(response.tokens) for response in responses],
        "ended": [response.segments.ended for response in responses],
        "tokens": saved_lib.text_of([response.tokens for response in responses], np.int32),
        "logprobs": saved_lib.text_of([response.logprobs for response in responses], np.float32),
        "rewards": [
            [reward.total, reward.accuracy, reward.format, reward.reason.value]
            for reward in (response.reward for response in responses)
        ],
    }


def decode(
    saved: Mapping[str, rlvr_groups.Json],
    *,
    opened: prompts_lib.Opened,
    words: processor.Processor,
    reader: policy_responses.Reader,
) -> rlvr_groups.Group:
    """Return the group that `encode` was given."""
    # The prompt is read from the data again: pictures would swell the checkpoint.
    row = opened.rows[saved["index"]]
    (prompt,) = data_encode.encode_prompts([row], words)
    return rlvr_groups.Group(
        index=saved["index"],
        row=row,
        prompt=prompt,
        responses=responses_of(saved, reader.read),
        step=saved["step"],
    )


def responses_of(
    saved: Mapping[str, rlvr_groups.Json], read: Callable[[engine.Rollout], list[tags.Segments]]
) -> tuple[rlvr_groups.Response, ...]:
    """Return the responses of a group that `encode` was given; `read` cuts them into segments."""
    lengths = np.array(saved["lengths"], np.int32)
    tokens = saved_lib.arrays_of(saved["tokens"], np.int32, lengths)
    logprobs = saved_lib.arrays_of(saved["logprobs"], np.float32, lengths)
    padded = np.zeros((len(lengths), max(lengths)), np.int32)
    for number, response_tokens in enumerate(tokens):
        padded[number, : len(response_tokens)] = response_tokens
    # Segments are cut again instead of saved, by the very rule that cut them first.
    segments = read(
        engine.Rollout(
            tokens=padded,
            # Segments depend on the tokens alone.
            logprobs=np.zeros(padded.shape, np.float32),
            lengths=lengths,
            ended=np.array(saved["ended"], bool),
        )
    )
    rewards = [
        score.Reward(total=total, accuracy=accuracy, format=form, reason=score.Reason(reason))
        for total, accuracy, form, reason in saved["rewards"]
    ]
    return tuple(
        rlvr_groups.Response(
            tokens=tokens[number],
            logprobs=logprobs[number],
            segments=segments[number],
            reward=rewards[number],
        )
        for number in range(len(lengths))
    )
