"""The honesty panel in alignment, on a step's own pairs before they are learnt from."""

import time

import numpy as np
from flax import nnx

from prism_jax import discriminator_update, metrics
from prism_jax.stages import (
    align_config,
    align_feed,
    align_updates,
    honesty,
    honesty_asker,
    rollouts,
    segments,
    setup,
)


class Panel:
    """Measure the panel on the first step, where it is due, and on the last."""

    def __init__(
        self,
        options: align_config.Config,
        devices: setup.Devices,
        judge: setup.Model,
        *,
        feed: align_feed.Feed,
        shapes: align_feed.Shapes,
        score: honesty_asker.Scorer,
    ):
        own, rollout = options.discriminator, options.rollout
        num_segments = rollout.num_prompts * (1 + rollout.num_responses) * len(own.form.names)
        self._options, self._feed = options, feed
        self._asker = honesty_asker.Asker(
            judge,
            devices,
            align_updates.score_settings(options, devices),
            score,
            honesty_asker.Layout(
                shape=shapes.discriminator,
                positions=own.positions,
                is_paired=False,
                batch_pairs=shapes.discriminator.any_pairs(num_segments),
                sees_images=own.sees_images,
            ),
        )

    def __call__(
        self,
        step: int,
        params: nnx.State,
        asked: align_feed.Asked,
        drawn: rollouts.Drawn,
        scores: discriminator_update.ByName,
    ) -> metrics.Metrics:
        """Return the panel of this step, counted from 1; nothing where it is not due.

        Args:
          scores: of all segments of the step, from these parameters.
        """
        options = self._options.honesty
        is_first = step == 1 and options.every_steps is not None
        if not (is_first or options.is_due(step, self._options.train.num_steps)):
            return {}
        begun = time.monotonic()
        pairs, known = self._pairs(asked, drawn, scores)
        told = honesty.measure(
            pairs,
            self._asker.judge(params),
            known=known,
            fitted=None,
            num_pairs=options.num_pairs,
        )
        for line in honesty.warnings(told, pairs.segments):
            setup.say(line)
        told["time/honesty_seconds"] = time.monotonic() - begun
        return {name: rollouts.mean([value]) for name, value in told.items()}

    def _pairs(
        self,
        asked: align_feed.Asked,
        drawn: rollouts.Drawn,
        scores: discriminator_update.ByName,
    ) -> tuple[honesty.Pairs, np.ndarray]:
        """Return the teacher beside each well-formed response, and float[pairs, 2] scores."""
        form = self._options.discriminator.form
        responses = drawn.continuations()
        units, names, is_cut, known = [], [], [], []
        for number, found in enumerate(drawn.segments):
            if not found.format_ok:
                continue
            response = responses[number]
            teacher = asked.teachers[response.prompt]
            student = self._feed.reader.drawn(response.tokens, found)
            for place, name in enumerate(form.names):
                both = (teacher, student)
                units.append([segments.continuation(response.prompt, cut, name) for cut in both])
                names.append(place)
                is_cut.append(name in teacher.shortened)
                one = scores[name]
                known.append((one.teacher[response.prompt], one.student[number]))
        pairs = honesty.Pairs(
            prompts=asked.judged,
            units=units,
            names=names,
            is_cut=is_cut,
            segments=form.names,
            kinds=form.kinds,
        )
        return pairs, np.array(known, np.float32).reshape(-1, 2)
