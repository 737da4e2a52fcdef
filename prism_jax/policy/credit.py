"""Advantages of each token, where the parts of a response have their own."""

from collections.abc import Mapping, Sequence

import numpy as np

from prism_jax.policy import rollouts
from prism_jax.rewards import tags


def by_token(
    caption: np.ndarray, rest: np.ndarray, segments: Sequence[tags.Segments], lengths: np.ndarray
) -> np.ndarray:
    """Return float32[N, longest] advantages, 0 behind a response.

    Args:
      caption: float32[N], of the tokens of captions; `rest` of all others. A malformed response
        has no caption.
    """
    places = np.arange(lengths.max(initial=1))
    ends = np.array([s.caption_tokens if s.format_ok else 0 for s in segments], np.int32)[:, None]
    values = np.where(places < ends, caption[:, None], rest[:, None])
    return np.where(places < lengths[:, None], values, np.float32(0)).astype(np.float32)


def of_parts(by_part: Mapping[str, np.ndarray], responses: rollouts.Responses) -> np.ndarray:
    """Return advantages: float32[N], or with parts float32[N, longest].

    Args:
      by_part: float32[N] for "response", and "caption" and "cot" where these have their own. A
        malformed response gets the "response" advantage on all its tokens.
    """
    whole = np.asarray(by_part["response"])
    if len(by_part) == 1:
        return whole
    is_ok = np.array([one.format_ok for one in responses.segments])
    rest = np.where(is_ok, by_part["cot"], whole)
    caption = np.asarray(by_part["caption"])
    return by_token(caption, rest, responses.segments, responses.rollout.lengths)
