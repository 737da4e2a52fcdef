"""Pair accuracies in strata of length: how good is the discriminator where length says nothing?

    shorter    the teacher's segment is shorter than the student's, by more than a tenth of it
    similar    neither is longer than the other by more than that
    longer     the teacher's is longer

A discriminator that reads lengths alone is right in one of the outer strata, wrong in the other,
and as good as a coin in the middle. The length's probe is fitted on the pairs of all strata and
tested on those of the middle.
"""

import numpy as np

from prism_jax.honesty import probes

_SIMILAR = 1.1  # most of longer / shorter


def measure(pairs: probes.Pairs, gaps: np.ndarray) -> dict[str, float]:
    """Return the share of pairs in each stratum, and the accuracies where there are pairs.

    Args:
      gaps: float[N], teacher's score minus student's.
    """
    teacher, student = (np.maximum(x, 1) for x in (pairs.teacher_tokens, pairs.student_tokens))
    is_similar = np.maximum(teacher, student) <= _SIMILAR * np.minimum(teacher, student)
    masks = {
        "shorter": ~is_similar & (teacher < student),
        "similar": is_similar,
        "longer": ~is_similar & (teacher > student),
    }
    logged = {}
    for name, mask in masks.items():
        logged[f"{name}_fraction"] = float(np.mean(mask))
        if mask.any():
            logged[f"{name}_pair_accuracy"] = probes.accuracy(gaps[mask])
    if is_similar.any():
        guess = probes.length(pairs, pairs.at(is_similar))
        logged["similar_length_probe_accuracy"] = probes.accuracy(guess)
    return logged
