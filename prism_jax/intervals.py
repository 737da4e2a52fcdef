"""Confidence intervals of rates that were measured on a few hundred questions."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """A mean in [0, 1] and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def rate(per_prompt: Sequence[float], *, num_responses: int) -> Rate:
    """Return the mean over prompts with its interval by Wilson.

    Responses to one prompt resemble each other, so k responses to n prompts carry less information
    than k n responses to different prompts. The deviation s of the prompts' means measures how much
    less: with the overall mean p, the interval is that of p (1 - p) n / s^2 independent
    responses, at least n and at most k n. With one response to a prompt this is Wilson's interval
    of n. It is not empty when all are right.

    Args:
      per_prompt: for each prompt the mean of its responses' values, which are 0 or 1.
      num_responses: responses to a prompt.

    Source: E. B. Wilson 1927; the effective sample size of a cluster sample, L. Kish 1965.
    """
    num_prompts = len(per_prompt)
    if num_prompts == 0 or num_responses < 1:
        raise ValueError(f"a rate needs values, got {num_prompts} prompts x {num_responses}")
    mean = math.fsum(per_prompt) / num_prompts
    least, most = float(num_prompts), float(num_prompts * num_responses)
    size = least
    if 0 < mean < 1 and num_responses > 1 and num_prompts > 1:
        spread = statistics.variance(per_prompt) / num_prompts
        size = min(max(mean * (1 - mean) / spread, least), most) if spread > 0 else most
    return _wilson(mean, size)


def _wilson(mean: float, size: float) -> Rate:
    z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    shrink = 1 + z * z / size
    middle = (mean + z * z / (2 * size)) / shrink
    half = z / shrink * math.sqrt(mean * (1 - mean) / size + z * z / (4 * size * size))
    # Rounding must not put the mean outside of its interval.
    return Rate(
        mean=mean,
        low=min(max(0.0, middle - half), mean),
        high=max(min(1.0, middle + half), mean),
    )
