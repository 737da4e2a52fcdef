"""Prompts of earlier steps with the responses that the policy gave then, for the discriminator.

    step 1   learns from 1           step 2   from 2 and some of 1        step 3   from 3 and …

A discriminator that learns from the newest responses alone forgets what gave older ones away, and
the policy may come back to them. Which prompts are learned from again follows from the step alone,
and the responses are saved with the position of the data, so a resumed run is bit-equal. The policy
learns nothing from them.
Source: arXiv 1612.07828 §2.3: a history of refined images.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prism_jax.data import steps
from prism_jax.policy import responses as policy_responses
from prism_jax.policy import rollouts, saved
from prism_jax.rollout import engine
from prism_jax.stages.align import feed as align_feed

Json = Any
_KEY = "replay"  # in the position of the data


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Group:
    """The responses to one prompt."""

    step: int
    index: int  # of the row
    tokens: list[np.ndarray]  # int32[n] each
    ended: list[bool]

    def encoded(self) -> Json:
        return {
            "step": self.step,
            "index": self.index,
            "lengths": [len(tokens) for tokens in self.tokens],
            "ended": self.ended,
            "tokens": saved.text_of(self.tokens, np.int32),
        }

    @classmethod
    def decoded(cls, values: Mapping[str, Json]) -> "_Group":
        lengths = np.array(values["lengths"], np.int32)
        return cls(
            step=values["step"],
            index=values["index"],
            tokens=saved.arrays_of(values["tokens"], np.int32, lengths),
            ended=list(values["ended"]),
        )


class Replay:
    """The data of a run with the responses of its last steps."""

    def __init__(
        self,
        prompts: steps.Steps,
        *,
        num_prompts: int,
        num_steps: int,
        read: Callable[[Sequence[int]], align_feed.Prompts],
        reader: policy_responses.Reader,
    ):
        """Start without any.

        Args:
          num_prompts: learned from again in each step, `num_steps` old at most.
          read: returns the prompts of rows.
          reader: cuts responses into segments, by the rule that cut them first.
        """
        self._prompts, self._num_prompts, self._num_steps = prompts, num_prompts, num_steps
        self._read, self._reader = read, reader
        self._groups: list[_Group] = []
        self._encoded: list[Json] = []

    def __next__(self) -> align_feed.Prompts:
        return next(self._prompts)

    def get_state(self) -> Json:
        """Return the position of the prompts and the responses, as JSON values."""
        return self._prompts.get_state() | {_KEY: list(self._encoded)}

    def set_state(self, state: Mapping[str, Json]) -> None:
        """Continue at a position."""
        self._prompts.set_state(dict(state))
        self._encoded = list(state.get(_KEY, ()))
        self._groups = [_Group.decoded(values) for values in self._encoded]

    def drawn(self, step: int) -> tuple[align_feed.Prompts, rollouts.Responses] | None:
        """Return earlier prompts and responses; None in the first step.

        Args:
          step: number of this step, counted from 1.
        """
        if len(self._groups) < self._num_prompts:
            return None
        # From the step alone: a resumed run takes the same without a generator that is saved.
        places = np.random.default_rng(step).choice(
            len(self._groups), self._num_prompts, replace=False
        )
        groups = [self._groups[place] for place in sorted(places)]
        responses = [tokens for group in groups for tokens in group.tokens]
        ended = np.array([one for group in groups for one in group.ended], bool)
        lengths = np.array([len(tokens) for tokens in responses], np.int32)
        padded = np.zeros((len(responses), lengths.max()), np.int32)
        for number, tokens in enumerate(responses):
            padded[number, : len(tokens)] = tokens
        rollout = engine.Rollout(
            tokens=padded,
            # The discriminator reads tokens; the policy, which needs these, learns nothing here.
            logprobs=np.zeros(padded.shape, np.float32),
            lengths=lengths,
            ended=ended,
        )
        earlier = rollouts.Responses(
            rollout=rollout,
            segments=self._reader.read(rollout),
            num_prompts=len(groups),
            # They took their time in the step that drew them.
            seconds=0.0,
        )
        return self._read([group.index for group in groups]), earlier

    def add(self, step: int, prompts: align_feed.Prompts, responses: rollouts.Responses) -> None:
        """Keep the responses of a step, and drop those that are too old for the next."""
        rollout = responses.rollout
        each = len(rollout.lengths) // len(prompts.indices)
        for number, index in enumerate(prompts.indices):
            places = range(number * each, (number + 1) * each)
            group = _Group(
                step=step,
                index=index,
                tokens=[rollout.tokens[n, : rollout.lengths[n]] for n in places],
                ended=[bool(rollout.ended[n]) for n in places],
            )
            self._groups.append(group)
            # Encoded once: the position is read in every step.
            self._encoded.append(group.encoded())
        # As old as they will be in the step that may take them.
        recent = [
            n for n, group in enumerate(self._groups) if step + 1 - group.step <= self._num_steps
        ]
        self._groups = [self._groups[n] for n in recent]
        self._encoded = [self._encoded[n] for n in recent]


def joined(
    prompts: align_feed.Prompts,
    responses: rollouts.Responses,
    earlier: tuple[align_feed.Prompts, rollouts.Responses] | None,
) -> tuple[align_feed.Prompts, rollouts.Responses]:
    """Return a step's prompts and responses, followed by earlier ones."""
    if earlier is None:
        return prompts, responses
    more, old_responses = earlier
    # The newest stay first, so that the policy finds the scores of its responses in their places.
    longest = max(part.rollout.tokens.shape[1] for part in (responses, old_responses))

    def padded(name: str) -> np.ndarray:
        parts = [vars(part.rollout)[name] for part in (responses, old_responses)]
        if parts[0].ndim == 2:
            parts = [np.pad(x, ((0, 0), (0, longest - x.shape[1]))) for x in parts]
        return np.concatenate(parts)

    names = [field.name for field in dataclasses.fields(engine.Rollout)]
    return (
        align_feed.Prompts(
            indices=prompts.indices + more.indices,
            rows=prompts.rows + more.rows,
            policy=prompts.policy + more.policy,
            discriminator=prompts.discriminator + more.discriminator,
            teachers=prompts.teachers + more.teachers,
        ),
        rollouts.Responses(
            rollout=engine.Rollout(**{name: padded(name) for name in names}),
            segments=responses.segments + old_responses.segments,
            num_prompts=responses.num_prompts + old_responses.num_prompts,
            seconds=responses.seconds,
        ),
    )
