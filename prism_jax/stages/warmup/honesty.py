"""The evaluation of held-out pairs, with the honesty panel beside it."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from prism_jax import progress
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.honesty import panel as honesty_panel
from prism_jax.honesty import probes
from prism_jax.honesty import scoring as honesty_scoring
from prism_jax.rows import RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.warmup import config as warmup_config
from prism_jax.stages.warmup import feed as warmup_feed
from prism_jax.stages.warmup import step as warmup_step

Evaluate = Callable[[Any, int], Mapping[str, float]]

# Pairs on which the probes are fitted; more pairs hardly improve them.
_FITTED_PAIRS = 1024


def every_steps(first: int | None, second: int | None) -> int | None:
    """Return the steps between calls of a function that serves two intervals; None: never."""
    if first is None or second is None:
        return second if first is None else first
    return math.gcd(first, second)


def open_evaluation(
    options: warmup_config.Config,
    devices: devices_lib.Devices,
    model: setup_models.Model,
    feed: warmup_feed.Feed,
    shape: RowShape,
    *,
    num_steps: int,
) -> Evaluate | None:
    """Return the evaluation of held-out pairs: accuracies, and the honesty panel."""
    settings = warmup_step.score_settings(options, devices)
    score = discriminator_loss.make_scorer(model.graphdef, settings)
    layout = honesty_scoring.Layout(
        shape=shape,
        positions="mrope",
        is_paired=True,
        batch_pairs=options.train.num_pairs * len(feed.names),
        sees_images=options.data.sees_images,
    )
    return beside(
        feed.evaluation(score, shape, devices, num_batches=options.evaluate.num_batches),
        feed,
        honesty_scoring.Scoring(model, devices, settings, score, layout),
        options.honesty,
        evaluate_every_steps=options.evaluate.every_steps,
        num_steps=num_steps,
    )


def beside(
    evaluate: Evaluate | None,
    feed: warmup_feed.Feed,
    scoring: honesty_scoring.Scoring,
    options: honesty_panel.Options,
    *,
    evaluate_every_steps: int | None,
    num_steps: int,
) -> Evaluate | None:
    """Return the evaluation with the panel, each at its interval and after the last step.

    Probes are fitted on training pairs and tested on held-out pairs. Without held-out pairs nothing
    is measured.
    """
    if options.every_steps is None:
        return evaluate
    if evaluate is None:
        progress.say("no pairs are held out: the honesty panel is not measured")
        return None
    fitted: dict[str, probes.Pairs] = {}

    def both(state: Any, step: int) -> dict[str, float]:
        logged: dict[str, float] = {}
        # Called at the common interval of both, see `every_steps`.
        is_last = step == num_steps
        if evaluate_every_steps is not None and (step % evaluate_every_steps == 0 or is_last):
            logged |= evaluate(state, step)
        if not options.is_due(step, num_steps):
            return logged
        begun = time.monotonic()
        # Once, when the panel is first due: training pairs do not change, and reading them takes a
        # while.
        if not fitted:
            fitted.update(feed.probe_pairs(_FITTED_PAIRS))
        panel = honesty_panel.measure(
            feed.held_out_pairs(options.num_pairs),
            scoring.discriminator(state.params),
            known=None,
            fitted=fitted,
            num_pairs=options.num_pairs,
        )
        for line in honesty_panel.warnings(panel, feed.names):
            progress.say(line)
        panel["time/honesty_seconds"] = time.monotonic() - begun
        return logged | panel

    return both
