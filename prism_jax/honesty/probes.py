"""Trivial probes of a pair of segments: who is the teacher, from lengths or last tokens alone?

A probe is fitted on some pairs and tested on others. Where a probe is right as often as the
discriminator, the discriminator may have learned nothing else: its score then rewards a policy for
the length of its responses, or for the token they end with.

Each probe gives a segment a number and takes the one with the larger number for the teacher's:

    length       whether longer (or shorter) is the teacher's, or log-odds of up to 16 ranges of
                 lengths, whichever is right more often on the fitted pairs
    last token   log-odds of the token's id

Log-odds are log((teachers + 1) / (students + 1)) of the fitted segments, 0 for an unseen value.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

_MAX_RANGES = 16
_PAIRS_PER_RANGE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """The lengths, last tokens and prompts of pairs of one segment."""

    teacher_tokens: np.ndarray  # int[pairs]
    student_tokens: np.ndarray  # int[pairs]
    teacher_last: np.ndarray  # int[pairs]  id of the scored token, -1 for an empty segment
    student_last: np.ndarray  # int[pairs]
    prompt: np.ndarray  # int[pairs]

    @classmethod
    def of(
        cls,
        prompts: Sequence[int],
        teacher: Sequence[np.ndarray],
        student: Sequence[np.ndarray],
    ) -> "Pairs":
        """Read segments, int[n] tokens each."""
        return cls(
            teacher_tokens=np.array([len(tokens) for tokens in teacher], int),
            student_tokens=np.array([len(tokens) for tokens in student], int),
            teacher_last=_last(teacher),
            student_last=_last(student),
            prompt=np.array(prompts, int),
        )

    def at(self, mask: np.ndarray) -> "Pairs":
        """Return the pairs where `mask` is True."""
        return Pairs(**{name: value[mask] for name, value in vars(self).items()})

    def __len__(self) -> int:
        return len(self.prompt)


Probe = Callable[[Pairs, Pairs], np.ndarray]  # (fitted, tested) -> teacher's number - student's


def accuracy(gaps: np.ndarray) -> float:
    """Return the share of pairs in which the teacher's number is larger; equal ones count half."""
    return float(np.mean(np.where(gaps == 0, 0.5, gaps > 0)))


def length(fitted: Pairs, tested: Pairs) -> np.ndarray:
    """Return teacher minus student of the length's probe, float[pairs] of the tested ones."""
    sign = np.sign(np.sum(np.sign(fitted.teacher_tokens - fitted.student_tokens)))

    def by_sign(pairs: Pairs) -> np.ndarray:
        return sign * (pairs.teacher_tokens - pairs.student_tokens)

    lengths = np.concatenate([fitted.teacher_tokens, fitted.student_tokens])
    count = int(np.clip(len(fitted) // _PAIRS_PER_RANGE, 2, _MAX_RANGES))
    edges = np.unique(np.quantile(lengths, np.arange(1, count) / count))

    def by_range(pairs: Pairs) -> np.ndarray:
        return _log_odds(
            *(np.searchsorted(edges, side) for side in _lengths(fitted)),
            *(np.searchsorted(edges, side) for side in _lengths(pairs)),
        )

    is_sign_better = accuracy(by_sign(fitted)) >= accuracy(by_range(fitted))
    return by_sign(tested) if is_sign_better else by_range(tested)


def last_token(fitted: Pairs, tested: Pairs) -> np.ndarray:
    """Return teacher minus student of the last token's probe, float[pairs] of the tested ones."""
    return _log_odds(
        fitted.teacher_last, fitted.student_last, tested.teacher_last, tested.student_last
    )


PROBES: dict[str, Probe] = {"length": length, "last_token": last_token}


def across_prompts(probe: Probe, pairs: Pairs) -> float | None:
    """Return a probe's accuracy on prompts that it was not fitted on; None with one prompt alone.

    It is fitted on every second prompt and tested on the others, and the other way round.
    """
    _, order = np.unique(pairs.prompt, return_inverse=True)
    is_odd = order % 2 == 1
    if not is_odd.any():
        return None
    halves = [(pairs.at(is_odd), pairs.at(~is_odd)), (pairs.at(~is_odd), pairs.at(is_odd))]
    return accuracy(np.concatenate([probe(fitted, tested) for fitted, tested in halves]))


def _last(segments: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([tokens[-1] if len(tokens) else -1 for tokens in segments], int)


def _lengths(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    return pairs.teacher_tokens, pairs.student_tokens


def _log_odds(
    teacher: np.ndarray, student: np.ndarray, tested_teacher: np.ndarray, tested_student: np.ndarray
) -> np.ndarray:
    """Return the difference of log-odds of values, fitted on the first two."""

    def of(values: np.ndarray) -> np.ndarray:
        teachers = (values[:, None] == teacher).sum(-1)
        students = (values[:, None] == student).sum(-1)
        return np.log(teachers + 1.0) - np.log(students + 1.0)

    return of(tested_teacher) - of(tested_student)
