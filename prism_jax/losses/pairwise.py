"""Discriminator loss: Bradley-Terry on pairs of a teacher's and a student's segment.

Segments are named by the caller: "caption" and "cot" for the method, "response" for GAD (the whole
response), all three for both. Each segment is a separate term. The term `regulariser` is added to
them with its coefficient (the released score_reg is 1e-3, each segment's is 1).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from prism_jax import metrics
from prism_jax.losses import reduce

Normalisation = Literal["global", "microbatch"]
AllInvalid = Literal["none", "released"]
# The type to which scores and each step of the loss are rounded. The released head,
# clamp, difference and log-sigmoid are bfloat16: PRISM verl/verl/workers/critic/dp_critic.py:165.
ScoreDtype = Literal["float32", "bfloat16"]
REGULARISER = "regulariser"
# Factor of the released loss of a batch without any valid pair.
_FALLBACK_COEFFICIENT = 0.01


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """The scores of a segment over the pairs."""

    teacher: Any  # float32[pairs]  score of the teacher's segment
    student: Any  # float32[pairs]  score of the student's segment
    is_pair: Any  # bool[pairs]     the pair counts: a real row whose format is valid
    teacher_tokens: Any  # int32[pairs] or None  length, for the length correction
    student_tokens: Any  # int32[pairs] or None


def rounded(x: Float[Array, "..."], score_dtype: ScoreDtype) -> Float[Array, "..."]:
    """Return float32 values rounded to the type; gradients are rounded as well.

    A pair of casts would not do: XLA may remove it.
    """
    if score_dtype == "float32":
        return x
    if score_dtype != "bfloat16":
        raise ValueError(f"score_dtype must be one of {ScoreDtype.__args__}, got {score_dtype!r}")
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def correct_length(
    scores: Float[Array, "pairs"], num_tokens: Any, *, beta: float, score_dtype: ScoreDtype
) -> Float[Array, "pairs"]:
    """Return scores − beta · log(1 + max(num_tokens, 1)).

    Source: PRISM verl/verl/workers/critic/dp_critic.py:145.
    """
    num_tokens = rounded(jnp.maximum(num_tokens.astype(jnp.float32), 1.0), score_dtype)
    correction = rounded(beta * rounded(jnp.log1p(num_tokens), score_dtype), score_dtype)
    return rounded(scores - correction, score_dtype)


def corrected_scores(
    segment: Segment, *, beta: float | None, score_clip: float | None, score_dtype: ScoreDtype
) -> tuple[Float[Array, "pairs"], Float[Array, "pairs"]]:
    """Return teacher and student scores with length correction and clip, for loss and advantage."""
    teacher, student = (rounded(x, score_dtype) for x in (segment.teacher, segment.student))
    if beta is not None:
        shared = {"beta": beta, "score_dtype": score_dtype}
        teacher = correct_length(teacher, segment.teacher_tokens, **shared)
        student = correct_length(student, segment.student_tokens, **shared)
    if score_clip is not None:
        teacher, student = (
            rounded(jnp.clip(x, -score_clip, score_clip), score_dtype) for x in (teacher, student)
        )
    return teacher, student


def weights(
    is_pair: dict[str, Bool[Array, "*P"]],
    row_mask: Bool[Array, "*P"],
    *,
    normalisation: Normalisation,
    all_invalid: AllInvalid,
) -> dict[str, Float[Array, ""]]:
    """Return the weight of each term of `loss` over the whole batch, from its masks alone.

    Segment: its number of pairs; the number of rows with "microbatch" normalisation, or when
    there is no pair and the released fallback is used. Regulariser: the number of rows.
    """
    rows = row_mask.sum(dtype=jnp.float32)
    term_weights = {REGULARISER: rows}
    for name, pairs in is_pair.items():
        count = pairs.sum(dtype=jnp.float32)
        batch_pairs = count if all_invalid == "released" else None
        term_weights[name] = _weight(count, rows, batch_pairs, normalisation)
    return term_weights


def loss(
    segments: dict[str, Segment],
    row_mask: Bool[Array, "pairs"],
    *,
    score_clip: float | None,
    length_beta: dict[str, float] | None,
    normalisation: Normalisation,
    all_invalid: AllInvalid,
    batch_pairs: dict[str, Float[Array, ""]] | None,
    score_dtype: ScoreDtype,
) -> tuple[dict[str, reduce.Sum], metrics.Metrics]:
    """Return a term for each segment and `regulariser`, and metrics.

    With T and S the scores of teacher and student after the length correction (when `length_beta`
    gives the segment one) and then the clip to ±score_clip (its gradient is 0 outside):

        segment       Σ −log σ(T − S) over its pairs / their number
        regulariser   Σ over rows of the mean of T², S² over segments / rows, pairs or not

    Args:
      segments: by name; each array has an entry per row.
      row_mask: True for real rows, False for padding.
      score_clip: None is off.
      length_beta: coefficient of `correct_length` by segment; None, or a missing name, is off.
      normalisation: "global" divides by the pairs of the whole batch. "microbatch", as released,
        averages over the pairs of each microbatch and then over rows, so that the step depends
        on how the batch was split.
      all_invalid: the loss of a segment without a pair in the whole batch: "none" is 0;
        "released", 0.01 · −log σ(mean of T over the microbatch's rows), which drives the
        teacher's scores up.
      batch_pairs: the whole batch's number of pairs by segment; needed for "released" alone.
      score_dtype: "bfloat16" rounds scores, correction, clip, difference, log-sigmoid and squares,
        and their gradients; sums over rows are float32 either way.

    Source: PRISM verl/verl/workers/critic/dp_critic.py:949-990; GAD core_algos.py:1595.
    """
    _check(segments, length_beta, all_invalid, batch_pairs)
    rows = row_mask.sum(dtype=jnp.float32)
    terms, logged, squares = {}, {}, jnp.zeros(row_mask.shape, jnp.float32)
    for name, segment in segments.items():
        beta = None if length_beta is None else length_beta.get(name)
        teacher, student = corrected_scores(
            segment, beta=beta, score_clip=score_clip, score_dtype=score_dtype
        )
        each = (rounded(jnp.square(x), score_dtype) for x in (teacher, student))
        squares += sum(each) / (2 * len(segments))
        whole_pairs = None if batch_pairs is None else batch_pairs[name]
        terms[name] = _term(
            teacher,
            student,
            segment.is_pair,
            row_mask,
            whole_pairs,
            normalisation=normalisation,
            score_dtype=score_dtype,
        )
        logged |= _measure(name, segment, teacher, student, row_mask, score_clip)
    total = jnp.where(row_mask, squares, 0.0).sum()
    terms[REGULARISER] = reduce.Sum(total=total, weight=rows)
    for name, term in terms.items():
        logged[f"discriminator/{name}_loss"] = metrics.Mean(total=term.total, weight=term.weight)
    return terms, jax.lax.stop_gradient(logged)


def _check(
    segments: dict[str, Segment],
    length_beta: dict[str, float] | None,
    all_invalid: AllInvalid,
    batch_pairs: dict[str, Array] | None,
) -> None:
    if all_invalid not in AllInvalid.__args__:
        raise ValueError(f"all_invalid must be one of {AllInvalid.__args__}, got {all_invalid!r}")
    if (all_invalid == "released") != (batch_pairs is not None):
        raise ValueError(
            "batch_pairs must be given for all_invalid=released and be None otherwise, got "
            f"{batch_pairs} with {all_invalid}"
        )
    unknown = sorted(set(length_beta or {}) - set(segments))
    if unknown:
        raise ValueError(f"length_beta names {unknown}, the segments are {sorted(segments)}")


def _weight(
    pairs: Array, rows: Array, whole_pairs: Array | None, normalisation: Normalisation
) -> Array:
    """Return the weight of a segment, from the numbers of pairs and rows."""
    if normalisation == "microbatch":
        return rows
    if normalisation != "global":
        raise ValueError(f"normalisation must be global or microbatch, got {normalisation!r}")
    return pairs if whole_pairs is None else jnp.where(whole_pairs > 0, pairs, rows)


def _term(
    teacher: Array,
    student: Array,
    is_pair: Array,
    row_mask: Array,
    whole_pairs: Array | None,
    *,
    normalisation: Normalisation,
    score_dtype: ScoreDtype,
) -> reduce.Sum:
    rows, pairs = row_mask.sum(dtype=jnp.float32), is_pair.sum(dtype=jnp.float32)
    losses = _losses(rounded(teacher - student, score_dtype), score_dtype)
    total = jnp.where(is_pair, losses, 0.0).sum()
    if normalisation == "microbatch":
        total = total / jnp.maximum(pairs, 1.0) * rows
    if whole_pairs is not None:
        mean = jnp.where(row_mask, teacher, 0.0).sum() / jnp.maximum(rows, 1.0)
        fallback = _FALLBACK_COEFFICIENT * _losses(rounded(mean, score_dtype), score_dtype) * rows
        total = jnp.where(whole_pairs > 0, total, fallback)
    return reduce.Sum(total=total, weight=_weight(pairs, rows, whole_pairs, normalisation))


def _losses(differences: Array, score_dtype: ScoreDtype) -> Array:
    return rounded(-jax.nn.log_sigmoid(differences), score_dtype)


def _is_right(teacher: Array, student: Array) -> Array:
    """Return 1 where the teacher's score is higher, 0.5 where both are equal, as by chance.

    The released code counts a tie as wrong; a policy that repeats the teacher makes many ties.
    """
    return jnp.where(teacher == student, 0.5, (teacher > student).astype(jnp.float32))


def _measure(
    name: str,
    segment: Segment,
    teacher: Array,
    student: Array,
    row_mask: Array,
    score_clip: float | None,
) -> metrics.Metrics:
    """Return metrics over pairs, from corrected and clipped scores; absent without a pair."""
    is_pair = segment.is_pair
    logged = {
        f"discriminator/{name}_pair_accuracy": metrics.Mean.of(
            _is_right(teacher, student), is_pair
        ),
        f"discriminator/{name}_teacher_score": metrics.Mean.of(teacher, is_pair),
        f"discriminator/{name}_student_score": metrics.Mean.of(student, is_pair),
        f"discriminator/{name}_gap": metrics.Mean.of(teacher - student, is_pair),
        f"discriminator/{name}_valid_fraction": metrics.Mean.of(is_pair, row_mask),
    }
    if score_clip is not None:
        is_clipped = (jnp.abs(teacher) >= score_clip) | (jnp.abs(student) >= score_clip)
        logged[f"discriminator/{name}_clipped_fraction"] = metrics.Mean.of(is_clipped, is_pair)
    return logged
