"""Rows of prompts with their responses, the form that a policy learns from.

A row holds several prompts, each with one response; `policy.loss` reads them. The values of
response tokens lie side by side, response by response, apart from the row of tokens:

    row        P P P a b c  Q Q d e  .         P, Q prompts, a … e response tokens
    tokens     a b c d e .                     Z places
    offsets    0 3                             U places
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from models.config import Qwen3VLConfig
from models.inputs import Example
from prism_jax import batches
from prism_jax import rows as packed_rows
from prism_jax.rows import Continuation, Place, RowShape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """Packed responses in M microbatches of B rows, each with U places for responses.

    Z is the room for response tokens in a row, those of a response side by side.
    """

    text: Any  # TextInput [M, B, T]
    vision: Any  # VisionInput [M, B, P] or None
    predictors: (
        Any  # int32[M, B, Z]  place that predicts this response token; beyond the row for none
    )
    tokens: Any  # int32[M, B, Z]  the response tokens
    sampler_logprobs: Any  # float32[M, B, Z]  of the policy that gave the response
    offsets: Any  # int32[M, B, U]  first token of each response in Z
    lengths: Any  # int32[M, B, U]  its tokens; 0 where there is no response
    advantages: Any  # float32[M, B, Z]  of each response token
    old_logprobs: Any  # float32[M, B, Z]  of the trainer before the first update; None: on-policy
    # bool[M, B, U]  of an older policy: the old log-probs are the sampler's; None: all False
    is_older: Any
    reference_logprobs: Any  # float32[M, B, Z]  None: there is no reference policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedResponses:
    """Packed responses whose advantages are still to come, and the place of each response.

    The batch holds this process's rows; the places are those of all responses.
    """

    batch: PolicyBatch  # `advantages` is None
    places: list[Place]  # one a response, in order
    shape: RowShape

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Return values where the tokens lie: float32[M, B, Z].

        Args:
          values: [responses], or [responses, longest response].
        """
        local = self.shape.local_places
        rows = np.zeros((len(local), self.shape.row_continued_tokens), np.float32)
        for value, place in zip(values, self.places, strict=True):
            if place.row in local:
                part = slice(place.offset, place.offset + place.num_tokens)
                rows[local[place.row], part] = (
                    value[: place.num_tokens] if np.ndim(value) else value
                )
        return batches.split(rows, self.shape.num_microbatches)

    def lengths(self, has_loss: np.ndarray) -> np.ndarray:
        """Return `batch.lengths` with 0 for the responses that get no loss, bool[responses]."""
        return self.batch.lengths * self.mark(has_loss)

    def mark(self, is_marked: np.ndarray) -> np.ndarray:
        """Return flags where the responses lie: bool[M, B, U], False without a response."""
        local = self.shape.local_places
        marks = np.zeros((len(local), self.shape.row_sequences), bool)
        for place, value in zip(self.places, is_marked, strict=True):
            if place.row in local:
                marks[local[place.row], place.slot] = value
        return batches.split(marks, self.shape.num_microbatches)

    def read(self, values: np.ndarray, max_response_tokens: int) -> np.ndarray:
        """Return values [M, B, Z] response by response: float32[responses, max_response_tokens].

        Args:
          values: of the rows of all processes, see `batches.to_host`.
        """
        rows = np.asarray(values).reshape(self.shape.num_rows, -1)
        by_response = np.zeros((len(self.places), max_response_tokens), np.float32)
        for number, place in enumerate(self.places):
            part = slice(place.offset, place.offset + place.num_tokens)
            by_response[number, : place.num_tokens] = rows[place.row, part]
        return by_response


def on_policy_batch(
    prompts: Sequence[Example],
    responses: Sequence[Continuation],
    logprobs: Sequence[np.ndarray],
    advantages: np.ndarray,
    shape: RowShape,
    config: Qwen3VLConfig,
) -> PolicyBatch:
    """Return prompts and responses in rows, for one update right after the rollout.

    Args:
      logprobs: float32[n] of the sampler for each response's tokens.
      advantages: float32[responses], one a response, or float32[responses, longest response].
    """
    packed = packed_responses(prompts, responses, logprobs, shape, config)
    return dataclasses.replace(packed.batch, advantages=packed.spread(advantages))


def packed_responses(
    prompts: Sequence[Example],
    responses: Sequence[Continuation],
    logprobs: Sequence[np.ndarray],
    shape: RowShape,
    config: Qwen3VLConfig,
) -> PackedResponses:
    """Return prompts and responses in rows; advantages and old log-probs may follow."""
    packed = packed_rows.pack(prompts, [[response] for response in responses], shape, config)
    local = shape.local_places
    by_token = (len(local), shape.row_continued_tokens)
    by_response = (len(local), shape.row_sequences)
    # Beyond the row where there is no response token: the loss reads zeros from there.
    predictors = np.full(by_token, packed.text.tokens.shape[-1], np.int32)
    tokens = np.zeros(by_token, np.int32)
    sampler_logprobs = np.zeros(by_token, np.float32)
    offsets, lengths = np.zeros(by_response, np.int32), np.zeros(by_response, np.int32)
    for number, place in enumerate(packed.places):
        if place.row not in local:
            continue
        row, part = local[place.row], slice(place.offset, place.offset + place.num_tokens)
        predictors[row, part] = place.start - 1 + np.arange(place.num_tokens)
        predictors[row, place.offset] = place.before
        tokens[row, part] = responses[number].tokens
        sampler_logprobs[row, part] = logprobs[number]
        offsets[row, place.slot] = place.offset
        lengths[row, place.slot] = place.num_tokens
    arrays = {
        "predictors": predictors,
        "tokens": tokens,
        "sampler_logprobs": sampler_logprobs,
        "offsets": offsets,
        "lengths": lengths,
    }
    batch = PolicyBatch(
        text=packed.text,
        vision=packed.vision,
        advantages=None,
        old_logprobs=None,
        is_older=None,
        reference_logprobs=None,
        **batches.split(arrays, shape.num_microbatches),
    )
    return PackedResponses(batch=batch, places=packed.places, shape=shape)
