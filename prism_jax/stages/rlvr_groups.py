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

import base64
import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models.inputs import Example
from prism_jax import errors, metrics
from prism_jax.data import processor, records, steps
from prism_jax.rewards import score, tags
from prism_jax.rollout import engine
from prism_jax.setup import prompts as prompts_lib
from prism_jax.stages import responses, rlvr_config, rollouts

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
    asked: Prompts, drawn: rollouts.Drawn, rewards: Sequence[score.Reward], *, step: int
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Hold what a step begins with."""

    first: Prompts | None  # None: the groups that are left over are enough, nothing is drawn
    feed: "Feed"


class Feed:
    """Give the prompts of a run; hold what a step leaves for the next one, and save it."""

    def __init__(
        self,
        prompts: steps.Steps,
        *,
        num_prompts: int,
        is_refilled: bool,
        coefficient: float | None,
        reference: str | None,
        decode: Callable[[Json], Group],
    ):
        """Start at the first prompts.

        Args:
          num_prompts: that a step learns from.
          is_refilled: groups may be left over and drawn again.
          coefficient: of the KL in the reward, where it is adapted; None where it is not.
          reference: names the parameters of the reference policy; another one is refused.
          decode: undoes `encode`.
        """
        self._prompts, self._num_prompts, self._decode = prompts, num_prompts, decode
        self._is_refilled, self._reference = is_refilled, reference
        self.surplus: list[Group] = []
        self.coefficient = coefficient

    def __next__(self) -> Asked:
        """Return the first prompts of a step."""
        is_full = len(self.surplus) >= self._num_prompts
        return Asked(first=None if is_full else self.more(), feed=self)

    def more(self) -> Prompts:
        """Return the next prompts."""
        return next(self._prompts)

    def keep(self, *, surplus: Sequence[Group], coefficient: float | None) -> None:
        """Hold these for the next step."""
        self.surplus, self.coefficient = list(surplus), coefficient

    def get_state(self) -> dict[str, Json]:
        """Return the position of the prompts and what is held, as JSON values."""
        state = self._prompts.get_state()
        if self._is_refilled:
            state["surplus"] = [encode(group) for group in self.surplus]
        if self.coefficient is not None:
            state["kl_coefficient"] = self.coefficient
        if self._reference is not None:
            state["reference"] = self._reference
        return state

    def set_state(self, state: Mapping[str, Json]) -> None:
        """Continue at a position.

        Raises:
          InputError: it is of other prompts or of another reference policy.
        """
        self._prompts.set_state(dict(state))
        if self._reference != state.get("reference"):
            raise errors.InputError(
                f"cannot resume: the reference policy was {state.get('reference')} when the "
                f"checkpoint was written and is {self._reference} now"
            )
        self.surplus = [self._decode(group) for group in state.get("surplus", ())]
        if self.coefficient is not None:
            # Absent where a run of another configuration is continued on purpose.
            self.coefficient = state.get("kl_coefficient", self.coefficient)


def encode(group: Group) -> dict[str, Json]:
    """Return a group as JSON values; its prompt is named by the number of the row."""
    found = group.responses
    return {
        "index": group.index,
        "step": group.step,
        "lengths": [len(one.tokens) for one in found],
        "ended": [one.segments.ended for one in found],
        "tokens": _text([one.tokens for one in found], np.int32),
        "logprobs": _text([one.logprobs for one in found], np.float32),
        "rewards": [
            [one.reward.total, one.reward.accuracy, one.reward.format, one.reward.reason.value]
            for one in found
        ],
    }


def decode(
    saved: Mapping[str, Json],
    *,
    opened: prompts_lib.Opened,
    words: processor.Processor,
    reader: responses.Reader,
) -> Group:
    """Return the group that `encode` was given."""
    row = opened.rows[saved["index"]]
    (prompt,) = rollouts.encode_prompts([row], words)
    return Group(
        index=saved["index"],
        row=row,
        prompt=prompt,
        responses=responses_of(saved, reader.read),
        step=saved["step"],
    )


def responses_of(
    saved: Mapping[str, Json], read: Callable[[engine.Rollout], list[tags.Segments]]
) -> tuple[Response, ...]:
    """Return the responses of a group that `encode` was given; `read` cuts them into segments."""
    lengths = np.array(saved["lengths"], np.int32)
    tokens = _arrays(saved["tokens"], np.int32, lengths)
    logprobs = _arrays(saved["logprobs"], np.float32, lengths)
    padded = np.zeros((len(lengths), max(lengths)), np.int32)
    for number, one in enumerate(tokens):
        padded[number, : len(one)] = one
    segments = read(
        engine.Rollout(
            tokens=padded,
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
        Response(
            tokens=tokens[number],
            logprobs=logprobs[number],
            segments=segments[number],
            reward=rewards[number],
        )
        for number in range(len(lengths))
    )


def _text(arrays: Sequence[np.ndarray], dtype: type) -> str:
    """Return arrays behind one another as text, every bit of them."""
    joined = np.concatenate(arrays).astype(np.dtype(dtype).newbyteorder("<"))
    return base64.b64encode(zlib.compress(joined.tobytes())).decode()


def _arrays(text: str, dtype: type, lengths: np.ndarray) -> list[np.ndarray]:
    """Undo `_text`."""
    data = zlib.decompress(base64.b64decode(text))
    joined = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype)
    return np.split(joined, np.cumsum(lengths)[:-1])
