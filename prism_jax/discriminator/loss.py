"""The discriminator's scores and losses over packed segments.

Warm-up knows its pairs beforehand: teacher and student of a pair stand side by side in one row,
and `pair_loss` compares them. Alignment compares each teacher's segment with those of many
responses, too many for one microbatch. But the loss depends on the parameters through the scores
alone, which were computed for the reward, from the same parameters. So its gradient with respect
to every score is known before the update (`gradients`), and `surrogate.loss` sums
score x gradient over any split of the segments: the same update, each segment scored once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import attention, discriminator, moe
from models.noise import EmbeddingNoise
from models.text import Remat
from prism_jax import metrics
from prism_jax.discriminator import balance, lengths, swaps
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import penalty as penalty_lib
from prism_jax.losses import pairwise
from prism_jax.training import train_step

ROUTER = balance.ROUTER


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The computation of scores."""

    implementation: attention.Implementation
    remat: Remat
    head_dropout: float  # while learning; 0 for none
    score_dtype: pairwise.ScoreDtype  # of the head
    penalty: penalty_lib.Penalty | None = None  # of the update alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairRule:
    """The numbers of the pair loss, see `losses.pairwise`."""

    score_clip: float | None
    regulariser: float  # coefficient of the mean square of the scores
    router: float  # coefficient of the router's load balance; 0 where there is no router
    length_beta: tuple[tuple[str, float], ...]  # coefficient of the length by segment
    # None: a mean over the pairs of the step. n: a mean over the pairs among n responses each,
    # averaged over responses, as the released update splits a step.
    microbatch_pairs: int | None
    all_invalid: pairwise.AllInvalid
    score_dtype: pairwise.ScoreDtype  # of the loss, see `losses.pairwise`
    # See `discriminator.lengths`: pairs of similar lengths alone; the fitted effect of length
    # removed; the coefficient of other pictures.
    match_ratio: float | None = None
    is_fitted: bool = False
    swap_coefficient: float | None = None

    def coefficients(self, names: Sequence[str], *, of_segment: float) -> dict[str, float]:
        """Return the factor of each term of `pair_loss`."""
        factors = dict.fromkeys(names, of_segment) | {pairwise.REGULARISER: self.regulariser}
        return factors | ({ROUTER: self.router} if self.router else {})


def scores(
    model: discriminator.Discriminator,
    batch: discriminator_batch.SegmentBatch,
    settings: Settings,
    key: jax.Array | None,
    noise: EmbeddingNoise | None = None,
) -> tuple[jax.Array, moe.RouterStats | None]:
    """Return float32[B, U] scores of one microbatch and the router's counts.

    A microbatch without segments is not computed: its scores and counts are 0.

    Args:
      key: of the head's dropout; None for none, as where scores are only read.
    """
    graphdef, params = nnx.split(model)
    dropout = None
    if key is not None and settings.head_dropout:
        dropout = discriminator.HeadDropout(rate=settings.head_dropout, key=key)

    def forward(params: nnx.State) -> tuple[jax.Array, moe.RouterStats | None]:
        return nnx.merge(graphdef, params)(
            batch.text,
            batch.vision,
            batch.last,
            implementation=settings.implementation,
            remat=settings.remat,
            kind=batch.kind,
            head_dropout=dropout,
            score_dtype=None if settings.score_dtype == "float32" else settings.score_dtype,
            noise=noise,
        )

    shapes = jax.eval_shape(forward, params)

    def zeros(params: nnx.State) -> tuple[jax.Array, moe.RouterStats | None]:
        del params
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return jax.lax.cond(batch.is_segment.any(), forward, zeros, params)


def all_scores(
    model: discriminator.Discriminator,
    batch: discriminator_batch.SegmentBatch,
    settings: Settings,
    key: jax.Array | None,
) -> jax.Array:
    """Return float32[M, B, U], one microbatch after the other.

    With a key they are the scores that an update of the same key computes.
    """
    if key is None:
        return jax.lax.map(lambda part: scores(model, part, settings, None)[0], batch)
    numbers = jnp.arange(batch.is_segment.shape[0])
    return jax.lax.map(
        # As `training.train_step` numbers its microbatches.
        lambda part: scores(model, part[1], settings, jax.random.fold_in(key, part[0]))[0],
        (numbers, batch),
    )


def make_scorer(
    graphdef: nnx.GraphDef, settings: Settings
) -> Callable[[nnx.State, discriminator_batch.SegmentBatch], jax.Array]:
    """Return the jitted `(params, batch) -> float32[M, B, U]`, without dropout."""
    return jax.jit(
        lambda params, batch: all_scores(nnx.merge(graphdef, params), batch, settings, None)
    )


def pair_weights(
    batch: discriminator_batch.SegmentBatch, names: Sequence[str], rule: PairRule
) -> dict[str, jax.Array]:
    """Return the weights of `pair_loss` over the whole batch, from its masks alone."""
    pair_name = _learned_pairs(batch, rule)
    weights = pairwise.weights(
        {name: pair_name == number for number, name in enumerate(names)},
        pair_name >= 0,
        normalisation="global",
        all_invalid="none",
    )
    return weights | balance.weight(batch, rule.router)


def pair_loss(
    model: discriminator.Discriminator,
    batch: discriminator_batch.SegmentBatch,
    names: Sequence[str],
    rule: PairRule,
    settings: Settings,
    key: jax.Array,
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return a term for each name, the regulariser and the router's load balance.

    The regulariser counts the scores of each pair once; see `losses.pairwise.loss`.
    """
    raw, stats = scores(model, batch, settings, key)
    pair_name = _learned_pairs(batch, rule).reshape(-1)
    corrected = _corrected(raw, batch, names, rule)
    segments = {
        name: pairwise.Segment(
            teacher=corrected[:, 0::2].reshape(-1),
            student=corrected[:, 1::2].reshape(-1),
            is_pair=pair_name == number,
            teacher_tokens=None,
            student_tokens=None,
        )
        for number, name in enumerate(names)
    }
    terms, logged = pairwise.loss(
        segments,
        pair_name >= 0,
        score_clip=rule.score_clip,
        length_beta=None,
        normalisation="global",
        all_invalid="none",
        batch_pairs=None,
        score_dtype=rule.score_dtype,
    )
    router_terms, router_metrics = balance.term(batch, stats, rule.router)
    return terms | router_terms, logged | router_metrics


def _learned_pairs(batch: discriminator_batch.SegmentBatch, rule: PairRule) -> jax.Array:
    """Return `pair_name`, -1 for pairs whose lengths are too different to learn from."""
    if rule.match_ratio is None:
        return batch.pair_name
    teacher, student = batch.num_tokens[..., 0::2], batch.num_tokens[..., 1::2]
    return jnp.where(lengths.is_matched(teacher, student, rule.match_ratio), batch.pair_name, -1)


def _corrected(
    raw: jax.Array, batch: discriminator_batch.SegmentBatch, names: Sequence[str], rule: PairRule
) -> jax.Array:
    """Return the scores [B, U], those of each name corrected for length by its coefficient."""
    name_of = jnp.repeat(batch.pair_name, 2, axis=-1)
    for name, beta in rule.length_beta:
        corrected = pairwise.correct_length(
            raw.reshape(-1),
            batch.num_tokens.reshape(-1),
            beta=beta,
            score_dtype=rule.score_dtype,
        )
        raw = jnp.where(name_of == names.index(name), corrected.reshape(raw.shape), raw)
    return raw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one segment name, of R responses to each prompt."""

    teacher: Any  # float32[prompts]
    student: Any  # float32[prompts * R]  0 where there is none
    is_pair: Any  # bool[prompts * R]  the response has the segment
    teacher_tokens: Any  # int32[prompts]
    student_tokens: Any  # int32[prompts * R]  0 where there is none
    # Of the teacher's segment behind another picture, see `discriminator.swaps`; None: not scored.
    swapped: Any = None  # float32[prompts]  0 where there is none
    has_swap: Any = None  # bool[prompts]

    def segment(self) -> pairwise.Segment:
        """Return every response beside the teacher's."""
        each = self.student.shape[0] // self.teacher.shape[0]
        return pairwise.Segment(
            teacher=jnp.repeat(self.teacher, each),
            student=self.student,
            is_pair=self.is_pair,
            teacher_tokens=jnp.repeat(self.teacher_tokens, each),
            student_tokens=self.student_tokens,
        )

    def without_length(self) -> tuple["Scores", jax.Array]:
        """Return the scores without the fitted effect of length, and its slope."""
        fit = lengths.without_length(
            self.teacher, self.student, self.is_pair, self.teacher_tokens, self.student_tokens
        )
        return dataclasses.replace(self, teacher=fit.teacher, student=fit.student), fit.beta


ByName = Mapping[str, Scores]


def scores_at(scores: jax.Array, places: ByName) -> dict[str, Scores]:
    """Return the scores [M, B, U] that stand at these places of the flattened array.

    `places` holds indices for scores; where `is_pair` is False the index means nothing.
    """
    flat = scores.reshape(-1)
    return {
        name: dataclasses.replace(
            place,
            teacher=flat[place.teacher],
            student=jnp.where(place.is_pair, flat[place.student], 0.0),
            swapped=None
            if place.swapped is None
            else jnp.where(place.has_swap, flat[place.swapped], 0.0),
        )
        for name, place in places.items()
    }


def gradients(
    scores: jax.Array, places: ByName, rule: PairRule
) -> tuple[jax.Array, metrics.Metrics]:
    """Return the gradient of the pair loss with respect to each score of [M, B, U], and metrics."""
    by_name, logged = gradients_by_name(scores_at(scores, places), rule)
    flat = jnp.zeros(scores.size, jnp.float32)
    for name, gradient in by_name.items():
        # Several responses may share a score, and each teacher's serves all responses: add up.
        students = jnp.where(places[name].is_pair, places[name].student, scores.size)
        flat = flat.at[places[name].teacher].add(gradient.teacher)
        flat = flat.at[students].add(gradient.student, mode="drop")
        if gradient.swapped is not None:
            swapped = jnp.where(places[name].has_swap, places[name].swapped, scores.size)
            flat = flat.at[swapped].add(gradient.swapped, mode="drop")
    return flat.reshape(scores.shape), logged


def gradients_by_name(scores: ByName, rule: PairRule) -> tuple[dict[str, Scores], metrics.Metrics]:
    """Return the gradient of the whole pair loss with respect to each score, and its metrics.

    The result has the structure of the scores, gradients in place of values. A step without any
    pair teaches nothing, so all gradients are 0, the regulariser's too; `all_invalid="released"`
    learns from such a step.
    """
    is_learned = {name: _is_learned(segment, rule) for name, segment in scores.items()}
    has_pair = jnp.stack([jnp.any(x) for x in is_learned.values()]).any()

    def loss(values: Mapping[str, tuple[jax.Array, jax.Array, jax.Array | None]]):
        compared, slopes = {}, {}
        for name, (teacher, student, swapped) in values.items():
            compared[name] = dataclasses.replace(
                scores[name], teacher=teacher, student=student, swapped=swapped
            )
            if rule.is_fitted:
                compared[name], slopes[name] = compared[name].without_length()
        segments = {name: one.segment() for name, one in compared.items()}
        learned = {
            name: dataclasses.replace(one, is_pair=is_learned[name])
            for name, one in segments.items()
        }
        terms, logged = _terms(learned, rule)
        if rule.match_ratio is not None:
            logged = _of_all_pairs(segments, is_learned, logged, rule)
        # The router's term has no gradient with respect to scores.
        factors = dataclasses.replace(rule, router=0.0).coefficients(list(values), of_segment=1.0)
        total = sum(factors[name] * term.value for name, term in terms.items())
        for name, slope in slopes.items():
            logged[f"discriminator/{name}_length_slope"] = metrics.Mean(
                total=jax.lax.stop_gradient(slope), weight=jnp.ones(())
            )
        for name, (teacher, _, swapped) in values.items():
            if swapped is not None and rule.swap_coefficient is not None:
                term, swap_metrics = swaps.term(teacher, swapped, scores[name].has_swap)
                total += rule.swap_coefficient * term
                logged |= jax.lax.stop_gradient(swap_metrics)
        if rule.all_invalid == "none":
            total = jnp.where(has_pair, total, 0.0)
        return total, logged

    values = {name: (one.teacher, one.student, one.swapped) for name, one in scores.items()}
    by_name, logged = jax.grad(loss, has_aux=True)(values)
    return {
        name: dataclasses.replace(scores[name], teacher=teacher, student=student, swapped=swapped)
        for name, (teacher, student, swapped) in by_name.items()
    }, logged


def _is_learned(scores: Scores, rule: PairRule) -> jax.Array:
    """Return bool[N * R], the responses whose pair with the teacher counts in the loss."""
    if rule.match_ratio is None:
        return scores.is_pair
    segment = scores.segment()
    is_matched = lengths.is_matched(
        segment.teacher_tokens, segment.student_tokens, rule.match_ratio
    )
    return scores.is_pair & is_matched


def _of_all_pairs(
    segments: Mapping[str, pairwise.Segment],
    is_learned: Mapping[str, jax.Array],
    logged: metrics.Metrics,
    rule: PairRule,
) -> metrics.Metrics:
    """Return accuracies and gaps over all pairs, losses over those of similar lengths."""
    _, of_all = _terms(segments, rule)
    losses = {name: metric for name, metric in logged.items() if name.endswith("_loss")}
    for name, segment in segments.items():
        share = metrics.Mean.of(is_learned[name], segment.is_pair)
        losses[f"discriminator/{name}_matched_fraction"] = share
    return of_all | losses


def _terms(
    segments: Mapping[str, pairwise.Segment], rule: PairRule
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return the terms of a whole step, in microbatches where the rule asks for them."""
    num_rows = next(iter(segments.values())).student.shape[0]
    size = num_rows if rule.microbatch_pairs is None else rule.microbatch_pairs
    batch_pairs = None
    if rule.all_invalid == "released":
        batch_pairs = {n: jnp.sum(s.is_pair, dtype=jnp.float32) for n, s in segments.items()}

    def loss(part: Mapping[str, pairwise.Segment]):
        return pairwise.loss(
            part,
            jnp.ones(size, bool),
            score_clip=rule.score_clip,
            length_beta=dict(rule.length_beta) or None,
            normalisation="global" if rule.microbatch_pairs is None else "microbatch",
            all_invalid=rule.all_invalid,
            batch_pairs=batch_pairs,
            score_dtype=rule.score_dtype,
        )

    parts = jax.tree.map(lambda x: x.reshape(-1, size), dict(segments))
    # Terms and metrics are sums and weights: those of the parts add up.
    return jax.tree.map(lambda x: x.sum(0), jax.vmap(loss)(parts))
