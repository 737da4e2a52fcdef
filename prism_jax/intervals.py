"""Confidence intervals of rates measured on a few hundred questions, and of means over seeds."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import special

CONFIDENCE = 0.95
_RESAMPLES = 4000
_CHUNK = 250  # of resamples at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """A mean in [0, 1] and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean of any sign and its 95 % interval; None: too few values for one."""

    mean: float
    low: float | None
    high: float | None


def over_seeds(values: Sequence[float]) -> Mean:
    """Return the mean of one value a seed with Student's interval, which two values already have.

    It covers everything that differs between seeds: data, initial weights, sampling. For paired
    differences give the differences.
    """
    if not values:
        raise ValueError("a mean needs values, got none")
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Mean(mean=mean, low=None, high=None)
    quantile = float(special.stdtrit(len(values) - 1, 0.5 + CONFIDENCE / 2))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Mean(mean=mean, low=mean - half, high=mean + half)


def over_prompts(by_seed: Sequence[Sequence[float]]) -> Mean:
    """Return the mean over seeds of the means over prompts, with a bootstrap's interval.

    The prompts of each seed are drawn again, the seeds are kept: the interval is that of these
    trained policies on other prompts, and says nothing about other seeds. The draws are always the
    same.

    Args:
      by_seed: for each seed a value a prompt; paired differences for a comparison.

    Source: B. Efron 1979, the percentile method.
    """
    if not by_seed or not all(len(values) for values in by_seed):
        raise ValueError("a bootstrap needs values of each seed")
    rng = np.random.default_rng(0)
    total = np.zeros(_RESAMPLES)
    for values in map(np.asarray, by_seed):
        for start in range(0, _RESAMPLES, _CHUNK):
            resamples = rng.integers(len(values), size=(_CHUNK, len(values)))
            total[start : start + _CHUNK] += values[resamples].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(total / len(by_seed), (tail, 1 - tail))
    mean = math.fsum(math.fsum(values) / len(values) for values in by_seed) / len(by_seed)
    return Mean(mean=mean, low=float(low), high=float(high))


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
