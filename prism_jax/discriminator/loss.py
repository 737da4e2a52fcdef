"""The discriminator's scores and losses over packed segments.

Warm-up knows its pairs beforehand: teacher and student of a pair stand side by side in one row,
and `pair_loss` compares them. Alignment compares each teacher's segment with those of many
responses, too many for one microbatch. But the loss depends on the parameters through the scores
alone, which were computed for the reward, from the same parameters. So its gradient with respect
to every score is known before the update (`gradients`), and `surrogate_loss` sums
score x gradient over any split of the segments: the same update, each segment scored once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import attention, discriminator, moe
from models.text import Remat
from prism_jax import metrics
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.losses import pairwise, reduce
from prism_jax.training import train_step

ROUTER = "router"
SCORES = "scores"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The computation of scores."""

    implementation: attention.Implementation
    remat: Remat
    head_dropout: float  # while learning; 0 for none
    score_dtype: pairwise.ScoreDtype  # of the head


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

    def coefficients(self, names: Sequence[str], *, of_segment: float) -> dict[str, float]:
        """Return the factor of each term of `pair_loss`."""
        factors = dict.fromkeys(names, of_segment) | {pairwise.REGULARISER: self.regulariser}
        return factors | ({ROUTER: self.router} if self.router else {})


def scores(
    model: discriminator.Discriminator,
    batch: discriminator_batch.SegmentBatch,
    settings: Settings,
    key: jax.Array | None,
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
    weights = pairwise.weights(
        {name: batch.pair_name == number for number, name in enumerate(names)},
        batch.pair_name >= 0,
        normalisation="global",
        all_invalid="none",
    )
    return weights | _router_weight(batch, rule.router)


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
    pair_name = batch.pair_name.reshape(-1)
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
    router_terms, router_metrics = _router_term(batch, stats, rule.router)
    return terms | router_terms, logged | router_metrics


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
    return flat.reshape(scores.shape), logged


def gradients_by_name(scores: ByName, rule: PairRule) -> tuple[dict[str, Scores], metrics.Metrics]:
    """Return the gradient of the whole pair loss with respect to each score, and its metrics.

    The result has the structure of the scores, gradients in place of values. A step without any
    pair teaches nothing, so all gradients are 0, the regulariser's too; `all_invalid="released"`
    learns from such a step.
    """
    has_pair = jnp.stack([jnp.any(segment.is_pair) for segment in scores.values()]).any()

    def loss(values: Mapping[str, tuple[jax.Array, jax.Array]]):
        segments = {
            name: dataclasses.replace(scores[name], teacher=teacher, student=student).segment()
            for name, (teacher, student) in values.items()
        }
        terms, logged = _terms(segments, rule)
        # The router's term has no gradient with respect to scores.
        factors = dataclasses.replace(rule, router=0.0).coefficients(list(values), of_segment=1.0)
        total = sum(factors[name] * term.value for name, term in terms.items())
        if rule.all_invalid == "none":
            total = jnp.where(has_pair, total, 0.0)
        return total, logged

    values = {name: (segment.teacher, segment.student) for name, segment in scores.items()}
    by_name, logged = jax.grad(loss, has_aux=True)(values)
    return {
        name: dataclasses.replace(scores[name], teacher=teacher, student=student)
        for name, (teacher, student) in by_name.items()
    }, logged


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


def surrogate_weights(
    batch: discriminator_batch.SegmentBatch, router: float
) -> dict[str, jax.Array]:
    """Return the weights of `surrogate_loss`: the gradients are those of the whole batch already.

    Without any gradient there is nothing to learn, nor from the router's term: all weights are 0.
    """
    has_gradient = (batch.score_gradients != 0).any().astype(jnp.float32)
    weights = {SCORES: jnp.ones(())} | _router_weight(batch, router)
    return {name: weight * has_gradient for name, weight in weights.items()}


def surrogate_loss(
    model: discriminator.Discriminator,
    batch: discriminator_batch.SegmentBatch,
    router: float,
    settings: Settings,
    key: jax.Array,
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return the sum over segments of score x its gradient; only its gradient has a meaning."""
    raw, stats = scores(model, batch, settings, key)
    total = jnp.where(batch.is_segment, raw * batch.score_gradients, 0.0).sum()
    terms, logged = _router_term(batch, stats, router)
    logged["discriminator/segments"] = metrics.Sum(value=batch.is_segment.sum(dtype=jnp.float32))
    return {SCORES: reduce.Sum(total=total, weight=jnp.ones(()))} | terms, logged


def _router_weight(
    batch: discriminator_batch.SegmentBatch, coefficient: float
) -> dict[str, jax.Array]:
    if not coefficient:
        return {}
    return {ROUTER: _num_tokens(batch)}


def _num_tokens(batch: discriminator_batch.SegmentBatch) -> jax.Array:
    """Return the tokens of all sequences, those of a shared prompt once for each."""
    text = batch.text
    segments = text.segments if text.shared is None else text.shared.segments
    return (segments.ids > 0).sum(dtype=jnp.float32)


def _router_term(
    batch: discriminator_batch.SegmentBatch, stats: moe.RouterStats | None, coefficient: float
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return the load balance of a microbatch, weighted by its tokens.

    It is not a sum over tokens, so it is the one term that depends on the split into microbatches:
    it asks for balance within each. It is measured even when its coefficient is 0.
    """
    if stats is None:
        return {}, {}
    tokens = _num_tokens(batch)
    total = moe.load_balance(stats) * tokens
    logged = {"discriminator/router_balance": metrics.Mean(total=total, weight=tokens)}
    if not coefficient:
        return {}, jax.lax.stop_gradient(logged)
    term = reduce.Sum(total=total, weight=tokens)
    return {ROUTER: term}, jax.lax.stop_gradient(logged)
