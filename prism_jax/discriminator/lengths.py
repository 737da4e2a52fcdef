"""Ways to keep a discriminator from winning by length; each is a field, all may be combined.

    match_ratio        a pair counts in the loss where its segments have similar lengths
    is_fitted          the part of the scores that is linear in log length is removed
    equal_min_tokens   all segments of a prompt are cut to the same length
    swap_coefficient   the teacher's segment behind another picture is below the one behind its own

The fit is made anew in each step, over the segments of both sides, each centred: responses by the
mean of their prompt, teachers by the mean of the step. So it does not mistake the distance of the
sides for an effect of length. It is part of the loss: a change of all scores that is linear in log
length changes neither loss nor advantages, and the loss has no gradient along it.

Source: the released code subtracts a constant times log length, set by hand
(PRISM verl/verl/workers/critic/dp_critic.py:145, `length_beta`). Length as the shortcut of learned
rewards, and its removal by a regression: arXiv 2310.03716, 2404.04475; mismatched pictures as
negatives: arXiv 1605.05396 (GAN-CLS).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax import configuration
from prism_jax.discriminator import segments

# Variance of log length, a segment, below which nothing is fitted: all lengths are equal.
_LEAST_VARIANCE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairLengths(configuration.Section):
    """The options of pairs, which warm-up and alignment share."""

    match_ratio: float | None  # most of longer / shorter segment in tokens; None: any
    equal_min_tokens: int | None  # segments are not cut below it; None: they are not cut

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.at_least(self, 1, "equal_min_tokens")
        if self.match_ratio is not None and not self.match_ratio >= 1:
            problems.append(f"match_ratio must be >= 1 or None, got {self.match_ratio}")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths(PairLengths):
    """The options of a discriminator that learns with the policy."""

    is_fitted: bool
    swap_coefficient: float | None  # of the loss of other pictures; None: there are none

    def problems(self) -> list[str]:
        """See `Section`."""
        return super().problems() + configuration.at_least(self, 0, "swap_coefficient")


def is_matched(first: jax.Array, second: jax.Array, ratio: float) -> jax.Array:
    """Return where the longer of two lengths is at most `ratio` times the shorter."""
    longer = jnp.maximum(jnp.maximum(first, second), 1).astype(jnp.float32)
    shorter = jnp.maximum(jnp.minimum(first, second), 1).astype(jnp.float32)
    return longer <= ratio * shorter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """Scores of a name without the part that is linear in log length."""

    teacher: jax.Array  # float32[N]
    student: jax.Array  # float32[N * R]
    beta: jax.Array  # float32[]  the slope that was removed


def without_length(
    teacher: jax.Array,
    student: jax.Array,
    is_pair: jax.Array,
    teacher_tokens: jax.Array,
    student_tokens: jax.Array,
) -> Fit:
    """Return scores − β · (log length − its mean), β fitted on the scores themselves.

    β = Σ x·s / Σ x², with x the log length and s the score, both centred: students by prompt,
    teachers over the step. Where all lengths are equal β is 0.

    Args:
      teacher: float32[N]; `student` float32[K].
      is_pair: bool[K], the students that count; K / N of them to each prompt.
    """
    each = student.shape[0] // teacher.shape[0]
    prompt = jnp.repeat(jnp.arange(teacher.shape[0]), each)
    of_teacher, of_student = (
        jnp.log1p(jnp.maximum(x, 1).astype(jnp.float32)) for x in (teacher_tokens, student_tokens)
    )

    def centred(values: jax.Array) -> jax.Array:
        counted = jnp.where(is_pair, values, 0.0)
        sums = jax.ops.segment_sum(counted, prompt, num_segments=teacher.shape[0])
        counts = jax.ops.segment_sum(
            is_pair.astype(jnp.float32), prompt, num_segments=teacher.shape[0]
        )
        return jnp.where(is_pair, values - (sums / jnp.maximum(counts, 1.0))[prompt], 0.0)

    x = jnp.concatenate([of_teacher - of_teacher.mean(), centred(of_student)])
    s = jnp.concatenate([teacher - teacher.mean(), centred(student)])
    variance = jnp.square(x).sum()
    num_segments = teacher.shape[0] + is_pair.sum(dtype=jnp.float32)
    has_variance = variance > _LEAST_VARIANCE * num_segments
    beta = jnp.where(has_variance, (x * s).sum() / jnp.where(has_variance, variance, 1.0), 0.0)
    middle = of_teacher.mean()
    return Fit(
        teacher=teacher - beta * (of_teacher - middle),
        student=jnp.where(is_pair, student - beta * (of_student - middle), 0.0),
        beta=beta,
    )


def cut_equally(
    teachers: Sequence[segments.Cut],
    students: Mapping[int, segments.Cut],
    prompt_of: Mapping[int, int],
    *,
    min_tokens: int,
) -> tuple[list[segments.Cut], dict[int, segments.Cut]]:
    """Return the segments, those of a prompt cut to the shortest of their name.

    Segments are not cut below `min_tokens`: one short response must not blind the discriminator to
    all others. A cut segment is scored at its last token, in the middle of the text.

    Args:
      students: by the number of the response; `prompt_of` gives the number of its prompt.
    """
    limits = [{name: len(tokens) for name, tokens in cut.tokens.items()} for cut in teachers]
    for number, cut in students.items():
        limit = limits[prompt_of[number]]
        for name, tokens in cut.tokens.items():
            limit[name] = min(limit[name], len(tokens))

    def shortened(cut: segments.Cut, limit: Mapping[str, int]) -> segments.Cut:
        tokens: dict[str, np.ndarray] = {
            name: part[: max(limit[name], min_tokens)] for name, part in cut.tokens.items()
        }
        return dataclasses.replace(cut, tokens=tokens)

    return (
        [shortened(cut, limit) for cut, limit in zip(teachers, limits, strict=True)],
        {number: shortened(cut, limits[prompt_of[number]]) for number, cut in students.items()},
    )
