"""The scores of a step's segments: packed, scored once, and read by name."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np
from flax import nnx

from models.inputs import Example
from prism_jax import batches, metrics
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import lengths as lengths_lib
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import opening, segments, swaps
from prism_jax.policy import rollouts
from prism_jax.rows import RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models

Places = dict[str, discriminator_loss.Scores]


class Prompts(Protocol):
    """The prompts of a step, as a discriminator reads them."""

    discriminator: list[Example]
    teachers: list[segments.Cut]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepScores:
    """The scores of a step, and the batch that the discriminator learns from."""

    # On the host, of this step's responses alone.
    by_name: dict[str, discriminator_loss.Scores]
    rewarding: dict[str, discriminator_loss.Scores]  # the same, or those of the mean of weights
    batch: discriminator_batch.SegmentBatch  # on the devices, with the gradient of each score
    places: Places  # of each score in the batch
    metrics: metrics.Metrics


class Scorer:
    """The scorer of a step's segments, those of the teacher once per prompt."""

    def __init__(
        self,
        cutter: opening.Cutter,
        devices: devices_lib.Devices,
        discriminator: setup_models.Model,
        *,
        shape: RowShape,
        score: Callable[[nnx.State, discriminator_batch.SegmentBatch], jax.Array],
    ):
        """Store the parts; nothing is compiled before the first step.

        Args:
          score: jitted (params, batch) -> float32[M, B, S], see `discriminator.loss.make_scorer`.
        """
        self._cutter, self._devices, self._discriminator = cutter, devices, discriminator
        self._shape, self._score = shape, score
        rule = cutter.section.rule(discriminator)
        self._scores_at = jax.jit(discriminator_loss.scores_at)
        self._gradients = jax.jit(functools.partial(discriminator_loss.gradients, rule=rule))

    def __call__(
        self,
        params: nnx.State,
        prompts: Prompts,
        responses: rollouts.Responses,
        *,
        num_prompts: int,
        rewarding: nnx.State | None = None,
        is_trusted: np.ndarray | None = None,
    ) -> StepScores:
        """Return the scores that the discriminator with these parameters gives.

        Args:
          rewarding: parameters whose scores reward the policy; None: the same.
          is_trusted: bool[N], False for prompts without a pair, see `stages.align.gate`; None: all
            True.
          num_prompts: of this step, the first ones; the others are of earlier steps, see
            `stages.align.replay`.
        """
        begun = time.monotonic()
        packed, places = packed_segments(
            prompts, responses, self._cutter, self._shape, self._discriminator
        )
        batch = self._devices.put(packed.batch, num_rows=self._shape.microbatch_rows)
        scores = self._score(params, batch)
        # The dump and the panel need the scores on the host. The time is measured behind the copy,
        # which waits for the devices.
        by_name = _first(batches.to_host(self._scores_at(scores, places)), num_prompts)
        rewards = by_name
        if rewarding is not None:
            steady = self._scores_at(self._score(rewarding, batch), places)
            rewards = _first(batches.to_host(steady), num_prompts)
        seconds = time.monotonic() - begun
        # The loss depends on the parameters through these scores alone, so its gradient with
        # respect to them is known before the update.
        if is_trusted is not None:
            places = of_trusted(places, is_trusted)
        gradients, logged = self._gradients(scores, places)
        return StepScores(
            by_name=by_name,
            rewarding=rewards,
            batch=dataclasses.replace(batch, score_gradients=gradients),
            places=places,
            metrics=logged | {"time/score_seconds": metrics.mean([seconds])},
        )


def pair_accuracy(by_name: Places) -> float | None:
    """Return the share of pairs in which the teacher scores higher, a mean over names.

    Equal scores count one half. None: there is no pair.
    """
    shares = []
    for scores in by_name.values():
        each = len(scores.student) // len(scores.teacher)
        gaps = (np.repeat(scores.teacher, each) - scores.student)[np.asarray(scores.is_pair)]
        if len(gaps):
            shares.append(np.mean(np.where(gaps == 0, 0.5, gaps > 0)))
    return float(np.mean(shares)) if shares else None


def _first(by_name: Places, num_prompts: int) -> Places:
    """Return the scores of the first prompts and of the responses to them."""

    def cut(scores: discriminator_loss.Scores) -> discriminator_loss.Scores:
        size = len(scores.teacher)
        if size == num_prompts:
            return scores
        return jax.tree.map(lambda x: x[: len(x) // size * num_prompts], scores)

    return {name: cut(scores) for name, scores in by_name.items()}


def of_trusted(places: Places, is_trusted: np.ndarray) -> Places:
    """Return the places, without pairs where the teacher is wrong."""

    def masked(place: discriminator_loss.Scores) -> discriminator_loss.Scores:
        each = len(place.is_pair) // len(is_trusted)
        has_swap = None if place.has_swap is None else place.has_swap & is_trusted
        is_pair = place.is_pair & np.repeat(is_trusted, each)
        return dataclasses.replace(place, is_pair=is_pair, has_swap=has_swap)

    return {name: masked(place) for name, place in places.items()}


def cuts_of(
    prompts: Prompts, responses: rollouts.Responses, cutter: opening.Cutter
) -> tuple[Sequence[segments.Cut], dict[int, segments.Cut]]:
    """Return the segments of teachers, and of well-formed responses by number, as scored."""
    continuations = responses.continuations()
    # A malformed response has no segments. It is not scored and pays its penalty instead.
    cuts = {
        number: cutter.reader.cut(continuations[number].tokens, text)
        for number, text in enumerate(responses.segments)
        if text.format_ok
    }
    min_tokens = cutter.section.lengths.equal_min_tokens
    if min_tokens is None:
        return prompts.teachers, cuts
    prompt_of = {number: continuations[number].prompt for number in cuts}
    return lengths_lib.cut_equally(prompts.teachers, cuts, prompt_of, min_tokens=min_tokens)


def packed_segments(
    prompts: Prompts,
    responses: rollouts.Responses,
    cutter: opening.Cutter,
    shape: RowShape,
    discriminator: setup_models.Model,
) -> tuple[discriminator_batch.PackedSegments, Places]:
    """Return the segments in rows, and by name the place of each score.

    The teacher's segments come first, then those of well-formed responses. Equal segments of a
    prompt are scored once. Otherwise they get slightly different scores, since rounding depends on
    the position in the row, and dividing by the group's standard deviation blows that difference
    up.
    """
    options = cutter.section
    names = options.form.names
    continuations = responses.continuations()
    format_ok = np.array([response.format_ok for response in responses.segments])
    teachers, cuts = cuts_of(prompts, responses, cutter)
    units, kinds, numbers = [], [], []
    known: dict[tuple[int, int, bytes], int] = {}
    for kind, name in enumerate(names):
        all_cuts = [*enumerate(teachers)]
        all_cuts += [(continuations[number].prompt, cut) for number, cut in cuts.items()]
        for prompt, cut in all_cuts:
            identity = (kind, prompt, cut.tokens[name].tobytes())
            if identity not in known:
                known[identity] = len(units)
                units.append([segments.continuation(prompt, cut, name)])
                kinds.append(kind)
            numbers.append(known[identity])
    examples, has_swap = prompts.discriminator, None
    if options.lengths.swap_coefficient is not None:
        others, has_swap = swaps.with_other_pictures(
            examples, spatial_merge_size=discriminator.config.vision.spatial_merge_size
        )
        examples = [*examples, *others]
        for prompt, cut in enumerate(teachers):
            if has_swap[prompt]:
                place = len(prompts.discriminator) + prompt
                units.append([segments.continuation(place, cut, names[0])])
                kinds.append(0)
    # The units of a prompt stand together, so that a row holds few prompts.
    order = sorted(range(len(units)), key=lambda number: units[number][0].prompt)
    new_numbers = np.argsort(order)
    swap_numbers = new_numbers[len(known) :]
    numbers = new_numbers[numbers]
    packed = discriminator_batch.segment_rows(
        examples,
        [units[number] for number in order],
        [kinds[number] for number in order],
        options.form.kinds,
        shape,
        discriminator.config,
        positions=options.positions,
    )
    indices = packed.indices()[numbers].reshape(len(names), -1)
    lengths = np.array([len(units[number][0].tokens) for number in order], np.int32)
    tokens = lengths[numbers].reshape(len(names), -1)
    places = {
        name: _places(indices[number], tokens[number], format_ok, num_prompts=len(prompts.teachers))
        for number, name in enumerate(names)
    }
    if has_swap is not None:
        swapped = np.zeros(len(has_swap), np.int32)
        swapped[has_swap] = packed.indices()[swap_numbers]
        # The first segment describes the picture: the caption where there is one.
        places[names[0]] = dataclasses.replace(places[names[0]], swapped=swapped, has_swap=has_swap)
    return packed, places


def _places(
    indices: np.ndarray, tokens: np.ndarray, format_ok: np.ndarray, *, num_prompts: int
) -> discriminator_loss.Scores:
    """Return the places of one name; those of malformed responses have no meaning."""
    student, student_tokens = (np.zeros(len(format_ok), np.int32) for _ in range(2))
    student[format_ok], student_tokens[format_ok] = indices[num_prompts:], tokens[num_prompts:]
    return discriminator_loss.Scores(
        teacher=indices[:num_prompts],
        student=student,
        is_pair=format_ok,
        teacher_tokens=tokens[:num_prompts],
        student_tokens=student_tokens,
    )
