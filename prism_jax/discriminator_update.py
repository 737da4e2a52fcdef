"""The discriminator's scores and losses over packed segments.

A row holds prompts with one segment each, scored at the segment's last token:

    row       P P P c c c  P P P d d  .       P a prompt, c and d segments of two responses
    scored              *          *

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
import numpy as np
from flax import nnx

from models import attention, discriminator, moe
from models.config import Qwen3VLConfig
from models.inputs import Example
from models.text import Remat
from prism_jax import continuations, metrics, train_step
from prism_jax.continuations import Continuation, RowShape
from prism_jax.losses import pairwise, reduce

ROUTER = "router"
PULLS = "scores"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Hold how the scores are computed."""

    implementation: attention.Implementation
    remat: Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairRule:
    """Hold the numbers of the pair loss, see `losses.pairwise`."""

    score_clip: float | None
    regulariser: float  # coefficient of the mean square of the scores
    router: float  # coefficient of the router's load balance; 0 where there is no router

    def coefficients(self, names: Sequence[str]) -> dict[str, float]:
        """Return the factor of each term of `pair_loss`."""
        every = dict.fromkeys(names, 1.0) | {pairwise.REGULARISER: self.regulariser}
        return every | ({ROUTER: self.router} if self.router else {})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentBatch:
    """Hold packed segments in M microbatches of B rows, each with S places for segments."""

    text: Any  # TextInput [M, B, T]
    vision: Any  # VisionInput [M, B, P] or None
    last: Any  # int32[M, B, S]  place in the row of the segment's last token; 0 without a segment
    is_segment: Any  # bool[M, B, S]
    # int32[M, B, S / 2]  which name the pair of segments 2i (teacher) and 2i + 1 (student) has,
    # -1 for none; None where segments are not in pairs
    pair_name: Any
    pulls: Any  # float32[M, B, S] or None  gradient of the loss with respect to the score


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedSegments:
    """Hold a batch and where the segments lie in it, to read their scores."""

    batch: SegmentBatch
    places: list[continuations.Place]
    shape: RowShape

    def read(self, scores: np.ndarray) -> np.ndarray:
        """Return the scores of the segments in their order, from float32[M, B, S]."""
        rows = np.asarray(scores).reshape(self.shape.num_rows, -1)
        return np.array([rows[place.row, place.slot] for place in self.places], np.float32)

    def pulls(self, gradients: np.ndarray) -> np.ndarray:
        """Return `SegmentBatch.pulls` of a gradient for each segment's score."""
        rows = np.zeros((self.shape.num_rows, self.shape.row_sequences), np.float32)
        for place, gradient in zip(self.places, np.asarray(gradients), strict=True):
            rows[place.row, place.slot] = gradient
        return continuations.split(rows, self.shape)


def pack(
    prompts: Sequence[Example],
    units: Sequence[Sequence[Continuation]],
    names: Sequence[int] | None,
    shape: RowShape,
    config: Qwen3VLConfig,
) -> PackedSegments:
    """Lay prompts with segments into rows.

    Args:
      units: a segment by itself, or teacher's and student's segment of a pair.
      names: which name each pair has; None where units are single segments.
    """
    packed = continuations.pack(prompts, units, shape, config)
    sizes = (shape.num_rows, shape.row_sequences)
    last, is_segment = np.zeros(sizes, np.int32), np.zeros(sizes, bool)
    for place in packed.places:
        last[place.row, place.slot] = place.start + place.num_tokens - 1
        is_segment[place.row, place.slot] = True
    pair_name = None
    if names is not None:
        pair_name = np.full((shape.num_rows, shape.row_sequences // 2), -1, np.int32)
        for name, place in zip(names, packed.places[::2], strict=True):
            pair_name[place.row, place.slot // 2] = name
        pair_name = continuations.split(pair_name, shape)
    batch = SegmentBatch(
        text=packed.text,
        vision=packed.vision,
        last=continuations.split(last, shape),
        is_segment=continuations.split(is_segment, shape),
        pair_name=pair_name,
        pulls=None,
    )
    return PackedSegments(batch=batch, places=packed.places, shape=shape)


def scores(
    model: discriminator.Discriminator, batch: SegmentBatch, settings: Settings
) -> tuple[jax.Array, moe.RouterStats | None]:
    """Return float32[B, S] scores of one microbatch and the router's counts.

    A microbatch without segments is not computed: its scores and counts are 0.
    """
    graphdef, params = nnx.split(model)

    def forward(params: nnx.State) -> tuple[jax.Array, moe.RouterStats | None]:
        return nnx.merge(graphdef, params)(
            batch.text,
            batch.vision,
            batch.last,
            implementation=settings.implementation,
            remat=settings.remat,
        )

    found = jax.eval_shape(forward, params)

    def nothing(params: nnx.State) -> tuple[jax.Array, moe.RouterStats | None]:
        del params
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)

    return jax.lax.cond(batch.is_segment.any(), forward, nothing, params)


def make_scorer(
    graphdef: nnx.GraphDef, settings: Settings
) -> Callable[[nnx.State, SegmentBatch], jax.Array]:
    """Return the jitted `(params, batch) -> float32[M, B, S]`, one microbatch after the other."""

    def score(params: nnx.State, batch: SegmentBatch) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return jax.lax.map(lambda part: scores(model, part, settings)[0], batch)

    return jax.jit(score)


def pair_weights(batch: SegmentBatch, names: Sequence[str], rule: PairRule) -> dict[str, jax.Array]:
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
    batch: SegmentBatch,
    names: Sequence[str],
    rule: PairRule,
    settings: Settings,
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return a term for each name, the regulariser and the router's load balance.

    The regulariser counts the scores of each pair once; see `losses.pairwise.loss`.
    """
    found, stats = scores(model, batch, settings)
    pair_name = batch.pair_name.reshape(-1)
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Hold the scores of one segment name: N prompts, R responses to each."""

    teacher: Any  # float32[N]
    student: Any  # float32[N * R]  0 where there is none
    is_pair: Any  # bool[N * R]  the response has the segment


def score_gradients(
    found: Mapping[str, Scores], rule: PairRule
) -> tuple[dict[str, Scores], metrics.Metrics]:
    """Return the gradient of the whole pair loss with respect to each score, and its metrics.

    The gradients stand in the places of the scores (`is_pair` is None).
    """

    def loss(raw: Mapping[str, tuple[jax.Array, jax.Array]]):
        segments = {}
        for name, (teacher, student) in raw.items():
            segments[name] = pairwise.Segment(
                teacher=jnp.repeat(teacher, student.shape[0] // teacher.shape[0]),
                student=student,
                is_pair=found[name].is_pair,
                teacher_tokens=None,
                student_tokens=None,
            )
        rows = next(iter(segments.values())).student.shape
        terms, told = pairwise.loss(
            segments,
            jnp.ones(rows, bool),
            score_clip=rule.score_clip,
            length_beta=None,
            normalisation="global",
            all_invalid="none",
            batch_pairs=None,
        )
        coefficients = dataclasses.replace(rule, router=0.0).coefficients(list(raw))
        return sum(coefficients[name] * term.value for name, term in terms.items()), told

    raw = {name: (one.teacher, one.student) for name, one in found.items()}
    gradients, told = jax.grad(loss, has_aux=True)(raw)
    return {
        name: Scores(teacher=teacher, student=student, is_pair=None)
        for name, (teacher, student) in gradients.items()
    }, told


def pulled_weights(batch: SegmentBatch, router: float) -> dict[str, jax.Array]:
    """Return the weights of `pulled_loss`: gradients are of the whole batch already."""
    return {PULLS: jnp.ones(())} | _router_weight(batch, router)


def pulled_loss(
    model: discriminator.Discriminator, batch: SegmentBatch, router: float, settings: Settings
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return the sum over segments of score x its gradient; the value itself means nothing."""
    found, stats = scores(model, batch, settings)
    total = jnp.where(batch.is_segment, found * batch.pulls, 0.0).sum()
    terms, told = _router_term(batch, stats, router)
    told["discriminator/segments"] = metrics.Sum(value=batch.is_segment.sum(dtype=jnp.float32))
    return {PULLS: reduce.Sum(total=total, weight=jnp.ones(()))} | terms, told


def _router_weight(batch: SegmentBatch, coefficient: float) -> dict[str, jax.Array]:
    if not coefficient:
        return {}
    return {ROUTER: (batch.text.segments.ids > 0).sum(dtype=jnp.float32)}


def _router_term(
    batch: SegmentBatch, stats: moe.RouterStats | None, coefficient: float
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return the load balance of a microbatch, weighted by its tokens.

    It is not a sum over tokens, so it is the one term that depends on the split: it asks for
    balance within each microbatch. Measured even when its coefficient is 0.
    """
    if stats is None:
        return {}, {}
    tokens = (batch.text.segments.ids > 0).sum(dtype=jnp.float32)
    total = moe.load_balance(stats) * tokens
    told = {"discriminator/router_balance": metrics.Mean(total=total, weight=tokens)}
    if not coefficient:
        return {}, jax.lax.stop_gradient(told)
    term = reduce.Sum(total=total, weight=tokens)
    return {ROUTER: term}, jax.lax.stop_gradient(told)
