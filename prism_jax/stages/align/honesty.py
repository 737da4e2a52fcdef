"""The honesty panel in alignment, on the pairs of a step before the discriminator is updated."""

import time

import numpy as np
from flax import nnx

from prism_jax import metrics, progress
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import segments, step_scores
from prism_jax.honesty import panel as honesty_panel
from prism_jax.honesty import scoring as honesty_scoring
from prism_jax.policy import rollouts
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.align import config as align_config
from prism_jax.stages.align import feed as align_feed
from prism_jax.stages.align import updates as align_updates


class Panel:
    """The panel, measured on the first step, where it is due, and on the last."""

    def __init__(
        self,
        options: align_config.Config,
        devices: devices_lib.Devices,
        discriminator: setup_models.Model,
        *,
        feed: align_feed.Feed,
        shapes: align_feed.Shapes,
        score: honesty_scoring.Scorer,
    ):
        # The panel packs its pairs into the rows of the step, so that nothing else is compiled.
        section, rollout = options.discriminator, options.rollout
        num_segments = rollout.num_prompts * (1 + rollout.num_responses) * len(section.form.names)
        self._options, self._feed = options, feed
        self._scoring = honesty_scoring.Scoring(
            discriminator,
            devices,
            align_updates.score_settings(options, devices),
            score,
            honesty_scoring.Layout(
                shape=shapes.discriminator,
                positions=section.positions,
                is_paired=False,
                batch_pairs=shapes.discriminator.any_pairs(num_segments),
                sees_images=section.sees_images,
            ),
        )

    def __call__(
        self,
        step: int,
        params: nnx.State,
        prompts: align_feed.Prompts,
        responses: rollouts.Responses,
        scores: discriminator_loss.ByName,
    ) -> metrics.Metrics:
        """Return the panel of this step, counted from 1; empty where it is not due.

        Args:
          scores: of all segments of the step, from these parameters.
        """
        options = self._options.honesty
        # The first step shows the warm-up's discriminator on responses of the policy.
        is_first = step == 1 and options.every_steps is not None
        if not (is_first or options.is_due(step, self._options.train.num_steps)):
            return {}
        begun = time.monotonic()
        # The step has just scored its pairs. Only pairs with a change are scored again.
        pairs, known = self._pairs(prompts, responses, scores)
        values = honesty_panel.measure(
            pairs,
            self._scoring.discriminator(params),
            known=known,
            fitted=None,
            num_pairs=options.num_pairs,
        )
        for line in honesty_panel.warnings(values, pairs.segments):
            progress.say(line)
        values["time/honesty_seconds"] = time.monotonic() - begun
        return {name: metrics.mean([value]) for name, value in values.items()}

    def _pairs(
        self,
        prompts: align_feed.Prompts,
        responses: rollouts.Responses,
        scores: discriminator_loss.ByName,
    ) -> tuple[honesty_panel.Pairs, np.ndarray]:
        """Return the teacher beside each well-formed response, and float[pairs, 2] scores."""
        form = self._options.discriminator.form
        continuations = responses.continuations()
        # As they were scored, equal lengths included.
        teachers, students = step_scores.cuts_of(prompts, responses, self._feed.cutter)
        units, names, is_cut, known = [], [], [], []
        for number, text in enumerate(responses.segments):
            # A malformed response was not cut, so it has no scores to compare.
            if not text.format_ok:
                continue
            response = continuations[number]
            teacher, student = teachers[response.prompt], students[number]
            for place, name in enumerate(form.names):
                both = (teacher, student)
                units.append([segments.continuation(response.prompt, cut, name) for cut in both])
                names.append(place)
                is_cut.append(name in teacher.shortened)
                segment = scores[name]
                known.append((segment.teacher[response.prompt], segment.student[number]))
        pairs = honesty_panel.Pairs(
            prompts=prompts.discriminator,
            units=units,
            names=names,
            is_cut=is_cut,
            segments=form.names,
            kinds=form.kinds,
        )
        return pairs, np.array(known, np.float32).reshape(-1, 2)
