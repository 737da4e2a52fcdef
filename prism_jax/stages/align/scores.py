"""The scores of a step's segments: packed, scored once, and read by name."""

import dataclasses
import functools
import time

import jax
import numpy as np
from flax import nnx

from prism_jax import batches, metrics
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import segments
from prism_jax.honesty import scoring as honesty_scoring
from prism_jax.policy import rollouts
from prism_jax.rows import RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.align import config as align_config
from prism_jax.stages.align import feed as align_feed

Places = dict[str, discriminator_loss.Scores]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepScores:
    """The scores of a step, and the batch that the discriminator learns from."""

    by_name: dict[str, discriminator_loss.Scores]  # on the host
    batch: discriminator_batch.SegmentBatch  # on the devices, with the gradient of each score
    places: Places  # of each score in the batch
    metrics: metrics.Metrics


class Scorer:
    """The scorer of a step's segments, those of the teacher once per prompt."""

    def __init__(
        self,
        options: align_config.Config,
        devices: devices_lib.Devices,
        discriminator: setup_models.Model,
        *,
        feed: align_feed.Feed,
        shape: RowShape,
        score: honesty_scoring.Scorer,
    ):
        """Store the parts; nothing is compiled before the first step.

        Args:
          score: jitted (params, batch) -> float32[M, B, U], see `discriminator.loss.make_scorer`.
        """
        self._options, self._devices, self._discriminator = options, devices, discriminator
        self._feed, self._shape, self._score = feed, shape, score
        rule = options.discriminator.rule(discriminator)
        self._scores_at = jax.jit(discriminator_loss.scores_at)
        self._gradients = jax.jit(functools.partial(discriminator_loss.gradients, rule=rule))

    def __call__(
        self, params: nnx.State, prompts: align_feed.Prompts, responses: rollouts.Responses
    ) -> StepScores:
        """Return the scores that the discriminator with these parameters gives."""
        begun = time.monotonic()
        packed, places = packed_segments(
            prompts, responses, self._feed, self._shape, self._discriminator
        )
        batch = self._devices.put(packed.batch, num_rows=self._shape.microbatch_rows)
        scores = self._score(params, batch)
        # The dump and the panel need the scores on the host. The time is measured behind the copy,
        # which waits for the devices.
        by_name = batches.to_host(self._scores_at(scores, places))
        seconds = time.monotonic() - begun
        # The loss depends on the parameters through these scores alone, so its gradient with
        # respect to them is known before the update.
        gradients, logged = self._gradients(scores, places)
        return StepScores(
            by_name=by_name,
            batch=dataclasses.replace(batch, score_gradients=gradients),
            places=places,
            metrics=logged | {"time/score_seconds": metrics.mean([seconds])},
        )


def packed_segments(
    prompts: align_feed.Prompts,
    responses: rollouts.Responses,
    feed: align_feed.Feed,
    shape: RowShape,
    discriminator: setup_models.Model,
) -> tuple[discriminator_batch.PackedSegments, Places]:
    """Return the segments in rows, and by name the place of each score.

    The teacher's segments come first, then those of well-formed responses. Equal segments of a
    prompt are scored once. Otherwise they get slightly different scores, since rounding depends on
    the position in the row, and dividing by the group's standard deviation blows that difference
    up.
    """
    options = feed.options.discriminator
    names = options.form.names
    continuations = responses.continuations()
    format_ok = np.array([response.format_ok for response in responses.segments])
    # A malformed response has no segments. It is not scored and pays its penalty instead.
    cuts = {
        number: feed.reader.cut(continuations[number].tokens, responses.segments[number])
        for number in np.flatnonzero(format_ok)
    }
    units, kinds, numbers = [], [], []
    known: dict[tuple[int, int, bytes], int] = {}
    for kind, name in enumerate(names):
        all_cuts = [*enumerate(prompts.teachers)]
        all_cuts += [(continuations[number].prompt, cut) for number, cut in cuts.items()]
        for prompt, cut in all_cuts:
            identity = (kind, prompt, cut.tokens[name].tobytes())
            if identity not in known:
                known[identity] = len(units)
                units.append([segments.continuation(prompt, cut, name)])
                kinds.append(kind)
            numbers.append(known[identity])
    # The units of a prompt stand together, so that a row holds few prompts.
    order = sorted(range(len(units)), key=lambda number: units[number][0].prompt)
    numbers = np.argsort(order)[numbers]
    packed = discriminator_batch.segment_rows(
        prompts.discriminator,
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
    return packed, {
        name: _places(indices[number], tokens[number], format_ok, num_prompts=len(prompts.teachers))
        for number, name in enumerate(names)
    }


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
