"""The honesty panel beside the warm-up's evaluation, on the same held-out pairs."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from prism_jax import progress
from prism_jax.honesty import asker as honesty_asker
from prism_jax.honesty import panel as honesty_panel
from prism_jax.honesty import probes
from prism_jax.stages.warmup import feed as warmup_feed

Evaluate = Callable[[Any, int], Mapping[str, float]]

# Pairs that the probes are fitted on; more make them hardly better.
_FITTED_PAIRS = 1024


def every_steps(one: int | None, other: int | None) -> int | None:
    """Return how often something has to be done when two things are."""
    if one is None or other is None:
        return other if one is None else one
    return math.gcd(one, other)


def beside(
    evaluate: Evaluate | None,
    feed: warmup_feed.Feed,
    asker: honesty_asker.Asker,
    options: honesty_panel.Options,
    *,
    evaluate_every_steps: int | None,
    num_steps: int,
) -> Evaluate | None:
    """Return what evaluates and measures the panel, each after its own steps and the last.

    Probes are fitted on pairs that are learnt from and asked about held-out ones. Without held-out
    pairs nothing is measured.
    """
    if options.every_steps is None:
        return evaluate
    if evaluate is None:
        progress.say("no pairs are held out: the honesty panel is not measured")
        return None
    fitted: dict[str, probes.Pairs] = {}

    def both(state: Any, step: int) -> dict[str, float]:
        told: dict[str, float] = {}
        is_last = step == num_steps
        if evaluate_every_steps is not None and (step % evaluate_every_steps == 0 or is_last):
            told |= evaluate(state, step)
        if not options.is_due(step, num_steps):
            return told
        begun = time.monotonic()
        if not fitted:
            fitted.update(feed.learnt_for_probes(_FITTED_PAIRS))
        panel = honesty_panel.measure(
            feed.held_out_pairs(options.num_pairs),
            asker.judge(state.params),
            known=None,
            fitted=fitted,
            num_pairs=options.num_pairs,
        )
        for line in honesty_panel.warnings(panel, feed.names):
            progress.say(line)
        panel["time/honesty_seconds"] = time.monotonic() - begun
        return told | panel

    return both
