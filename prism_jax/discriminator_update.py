"""The discriminator's scores and losses over packed segments.

Warm-up knows its pairs beforehand: teacher and student of a pair stand side by side in one row,
and `pair_loss` compares them. Alignment compares each teacher's segment with those of many
responses, too many for one microbatch. But the loss depends on the parameters through the scores
alone, which were computed for the reward, from the same parameters. So its gradient with respect
to every score is known before the update (`score_gradients`), and `pulled_loss` sums
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
from prism_jax import metrics, segment_rows, train_step
from prism_jax.losses import pairwise, reduce

ROUTER = "router"
PULLS = "scores"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Hold how the scores are computed."""

    implementation: attention.Implementation
    remat: Remat
    head_dropout: float  # while learning; 0 for none


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairRule:
    """Hold the numbers of the pair loss, see `losses.pairwise`."""

    score_clip: float | None
    regulariser: float  # coefficient of the mean square of the scores
    router: float  # coefficient of the router's load balance; 0 where there is no router
    length_beta: tuple[tuple[str, float], ...]  # coefficient of the length by segment
    # None: a mean over the pairs of the step. n: a mean over the pairs among n responses each,
    # averaged over responses, as the released update splits a step.
    microbatch_pairs: int | None
    all_invalid: pairwise.AllInvalid

    def coefficients(self, names: Sequence[str], *, of_segment: float) -> dict[str, float]:
        """Return the factor of each term of `pair_loss`."""
        every = dict.fromkeys(names, of_segment) | {pairwise.REGULARISER: self.regulariser}
        return every | ({ROUTER: self.router} if self.router else {})


def scores(
    model: discriminator.Discriminator,
    batch: segment_rows.SegmentBatch,
    settings: Settings,
    key: jax.Array | None,
) -> tuple[jax.Array, moe.RouterStats | None]:
    """Return float32[B, S] scores of one microbatch and the router's counts.

    A microbatch without segments is not computed: its scores and counts are 0.

    Args:
      key: of the head's dropout; None for none, as scores that are looked at have it.
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
        )

    found = jax.eval_shape(forward, params)

    def nothing(params: nnx.State) -> tuple[jax.Array, moe.RouterStats | None]:
        del params
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)

    return jax.lax.cond(batch.is_segment.any(), forward, nothing, params)


def all_scores(
    model: discriminator.Discriminator,
    batch: segment_rows.SegmentBatch,
    settings: Settings,
    key: jax.Array | None,
) -> jax.Array:
    """Return float32[M, B, S], one microbatch after the other.

    With a key they are the scores that an update of the same key computes.
    """
    if key is None:
        return jax.lax.map(lambda part: scores(model, part, settings, None)[0], batch)
    numbers = jnp.arange(batch.is_segment.shape[0])
    return jax.lax.map(
        # As `train_step` numbers its microbatches.
        lambda part: scores(model, part[1], settings, jax.random.fold_in(key, part[0]))[0],
        (numbers, batch),
    )


def make_scorer(
    graphdef: nnx.GraphDef, settings: Settings
) -> Callable[[nnx.State, segment_rows.SegmentBatch], jax.Array]:
    """Return the jitted `(params, batch) -> float32[M, B, S]`, without dropout."""
    return jax.jit(
        lambda params, batch: all_scores(nnx.merge(graphdef, params), batch, settings, None)
    )


def pair_weights(
    batch: segment_rows.SegmentBatch, names: Sequence[str], rule: PairRule
) -> dict[str, jax.Array]:
    """Return the weights of `pair_loss` over the whole batch, from its masks alone."""
    found = pairwise.weights(
        {name: batch.pair_name == number for number, name in enumerate(names)},
        batch.pair_name >= 0,
        normalisation="global",
        all_invalid="none",
    )
    return found | _router_weight(batch, rule.router)


def pair_loss(
    model: discriminator.Discriminator,
    batch: segment_rows.SegmentBatch,
    names: Sequence[str],
    rule: PairRule,
    settings: Settings,
    key: jax.Array,
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return a term for each name, the regulariser and the router's load balance.

    The regulariser counts the scores of each pair once; see `losses.pairwise.loss`.
    """
    found, stats = scores(model, batch, settings, key)
    pair_name = batch.pair_name.reshape(-1)
    found = _corrected(found, batch, names, rule)
    segments = {
        name: pairwise.Segment(
            teacher=found[:, 0::2].reshape(-1),
            student=found[:, 1::2].reshape(-1),
            is_pair=pair_name == number,
            teacher_tokens=None,
            student_tokens=None,
        )
        for number, name in enumerate(names)
    }
    terms, told = pairwise.loss(
        segments,
        pair_name >= 0,
        score_clip=rule.score_clip,
        length_beta=None,
        normalisation="global",
        all_invalid="none",
        batch_pairs=None,
    )
    router, router_told = _router_term(batch, stats, rule.router)
    return terms | router, told | router_told


def _corrected(
    found: jax.Array, batch: segment_rows.SegmentBatch, names: Sequence[str], rule: PairRule
) -> jax.Array:
    """Return the scores [B, S], those of each name corrected for length by its coefficient."""
    name_of = jnp.repeat(batch.pair_name, 2, axis=-1)
    for name, beta in rule.length_beta:
        corrected = pairwise.correct_length(
            found.reshape(-1), batch.num_tokens.reshape(-1), beta=beta
        )
        found = jnp.where(name_of == names.index(name), corrected.reshape(found.shape), found)
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Hold the scores of one segment name: N prompts, R responses to each."""

    teacher: Any  # float32[N]
    student: Any  # float32[N * R]  0 where there is none
    is_pair: Any  # bool[N * R]  the response has the segment
    teacher_tokens: Any  # int32[N]
    student_tokens: Any  # int32[N * R]  0 where there is none

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


def at(found: jax.Array, places: ByName) -> dict[str, Scores]:
    """Return the scores [M, B, S] that stand at these places of the array laid flat.

    `places` holds indices for scores; where `is_pair` is False the index means nothing.
    """
    flat = found.reshape(-1)
    return {
        name: dataclasses.replace(
            one,
            teacher=flat[one.teacher],
            student=jnp.where(one.is_pair, flat[one.student], 0.0),
        )
        for name, one in places.items()
    }


def pulls(found: jax.Array, places: ByName, rule: PairRule) -> tuple[jax.Array, metrics.Metrics]:
    """Return the gradient of the pair loss with respect to each score of [M, B, S], and metrics."""
    gradients, told = score_gradients(at(found, places), rule)
    flat = jnp.zeros(found.size, jnp.float32)
    for name, one in gradients.items():
        nowhere = found.size
        students = jnp.where(places[name].is_pair, places[name].student, nowhere)
        flat = flat.at[places[name].teacher].add(one.teacher)
        flat = flat.at[students].add(one.student, mode="drop")
    return flat.reshape(found.shape), told


def score_gradients(found: ByName, rule: PairRule) -> tuple[dict[str, Scores], metrics.Metrics]:
    """Return the gradient of the whole pair loss with respect to each score, and its metrics.

    The gradients stand in the places of the scores.
    """

    def loss(raw: Mapping[str, tuple[jax.Array, jax.Array]]):
        segments = {
            name: dataclasses.replace(found[name], teacher=teacher, student=student).segment()
            for name, (teacher, student) in raw.items()
        }
        terms, told = _terms(segments, rule)
        every = dataclasses.replace(rule, router=0.0).coefficients(list(raw), of_segment=1.0)
        return sum(every[name] * term.value for name, term in terms.items()), told

    raw = {name: (one.teacher, one.student) for name, one in found.items()}
    gradients, told = jax.grad(loss, has_aux=True)(raw)
    return {
        name: dataclasses.replace(found[name], teacher=teacher, student=student)
        for name, (teacher, student) in gradients.items()
    }, told


def _terms(
    segments: Mapping[str, pairwise.Segment], rule: PairRule
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return the terms of a whole step, in microbatches where the rule asks for them."""
    num_rows = next(iter(segments.values())).student.shape[0]
    size = num_rows if rule.microbatch_pairs is None else rule.microbatch_pairs
    batch_pairs = None
    if rule.all_invalid == "released":
        batch_pairs = {n: jnp.sum(one.is_pair, dtype=jnp.float32) for n, one in segments.items()}

    def one(part: Mapping[str, pairwise.Segment]):
        return pairwise.loss(
            part,
            jnp.ones(size, bool),
            score_clip=rule.score_clip,
            length_beta=dict(rule.length_beta) or None,
            normalisation="global" if rule.microbatch_pairs is None else "microbatch",
            all_invalid=rule.all_invalid,
            batch_pairs=batch_pairs,
        )

    parts = jax.tree.map(lambda x: x.reshape(-1, size), dict(segments))
    # Terms and metrics are sums and weights: those of the parts add up.
    return jax.tree.map(lambda x: x.sum(0), jax.vmap(one)(parts))


def pulled_weights(batch: segment_rows.SegmentBatch, router: float) -> dict[str, jax.Array]:
    """Return the weights of `pulled_loss`: gradients are of the whole batch already."""
    return {PULLS: jnp.ones(())} | _router_weight(batch, router)


def pulled_loss(
    model: discriminator.Discriminator,
    batch: segment_rows.SegmentBatch,
    router: float,
    settings: Settings,
    key: jax.Array,
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return the sum over segments of score x its gradient; the value itself means nothing."""
    found, stats = scores(model, batch, settings, key)
    total = jnp.where(batch.is_segment, found * batch.pulls, 0.0).sum()
    terms, told = _router_term(batch, stats, router)
    told["discriminator/segments"] = metrics.Sum(value=batch.is_segment.sum(dtype=jnp.float32))
    return {PULLS: reduce.Sum(total=total, weight=jnp.ones(()))} | terms, told


def _router_weight(batch: segment_rows.SegmentBatch, coefficient: float) -> dict[str, jax.Array]:
    if not coefficient:
        return {}
    return {ROUTER: _num_tokens(batch)}


def _num_tokens(batch: segment_rows.SegmentBatch) -> jax.Array:
    """Return the tokens of all sequences, those of a shared prompt once for each."""
    text = batch.text
    segments = text.segments if text.shared is None else text.shared.segments
    return (segments.ids > 0).sum(dtype=jnp.float32)


def _router_term(
    batch: segment_rows.SegmentBatch, stats: moe.RouterStats | None, coefficient: float
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return the load balance of a microbatch, weighted by its tokens.

    It is not a sum over tokens, so it is the one term that depends on the split: it asks for
    balance within each microbatch. Measured even when its coefficient is 0.
    """
    if stats is None:
        return {}, {}
    tokens = _num_tokens(batch)
    total = moe.load_balance(stats) * tokens
    told = {"discriminator/router_balance": metrics.Mean(total=total, weight=tokens)}
    if not coefficient:
        return {}, jax.lax.stop_gradient(told)
    term = reduce.Sum(total=total, weight=tokens)
    return {ROUTER: term}, jax.lax.stop_gradient(told)
