"""The tokens that learn from each part of the reward.

    credit           tokens of the caption            of think and answer
    response         all of the reward                all of the reward          as released
    segment          all but the accuracy             all of the reward
    segment_shared   all but half of the accuracy     all of the reward

The answer follows from the reasoning, so a right answer is no evidence about the caption's words,
and a wrong one need not be the caption's fault. Format, length and the distance from the reference
concern every token. A malformed response has no parts: all of its tokens get the whole.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from prism_jax.rewards import tags
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import groups as rlvr_groups

# The share of the accuracy that does not reach captions.
WITHHELD = {"segment": 1.0, "segment_shared": 0.5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of N responses and their rewards."""

    accuracy: np.ndarray  # float32[N]  the accuracy's part of the reward
    segments: Sequence[tags.Segments]


def parts_of(
    responses: rlvr_groups.StepResponses, options: rlvr_config.Advantage, *, accuracy_weight: float
) -> Parts | None:
    """Return the parts of a step's responses; None where all tokens learn alike."""
    if options.credit == "response":
        return None
    accuracy = [response.reward.accuracy for response in responses.responses]
    return Parts(
        accuracy=np.float32(accuracy_weight) * np.array(accuracy, np.float32),
        segments=[response.segments for response in responses.responses],
    )


def summed(advantages: np.ndarray, more: np.ndarray | None) -> np.ndarray:
    """Return the sum of advantages by response [N] or by token [N, T]; None adds nothing."""
    if more is None:
        return advantages
    if advantages.ndim == more.ndim == 1:
        return advantages + more
    sides = [x if x.ndim == 2 else x[:, None] for x in (advantages, more)]
    width = max(x.shape[1] for x in sides)
    # Behind a response neither means anything.
    one, other = (
        x if x.shape[1] in (1, width) else np.pad(x, ((0, 0), (0, width - x.shape[1])))
        for x in sides
    )
    return one + other
