"""How experts are used by captions and by cots: loads, and what an expert tells of the segment."""

import numpy as np


def loads(choices: np.ndarray) -> np.ndarray:
    """Return the share of each kind's choices that fell on each expert, NaN for a kind unseen.

    Args:
      choices: float[L, K, E], how many tokens of each kind chose each expert.
    """
    total = choices.sum(-1, keepdims=True)
    return np.divide(choices, total, out=np.full(choices.shape, np.nan), where=total > 0)


def information_bits(choices: np.ndarray) -> np.ndarray:
    """Return the mutual information between expert and kind in each layer, bits[L].

    Every kind that was seen counts alike, however many tokens it has. With two kinds it is 1 where
    no expert serves both, and 0 where both use the experts alike; 0 too with one kind alone.

        I = H(mean over k of p(e | k)) - mean over k of H(p(e | k))
    """
    seen = choices.sum((0, 2)) > 0
    if seen.sum() < 2:
        return np.zeros(len(choices))
    share = loads(choices[:, seen])  # [L, K, E]
    return _entropy_bits(share.mean(1)) - _entropy_bits(share).mean(1)


def _entropy_bits(share: np.ndarray) -> np.ndarray:
    return -(share * np.log2(np.where(share > 0, share, 1.0))).sum(-1)
