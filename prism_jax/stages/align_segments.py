"""Alignment's segments: into rows to be scored, their places by name, and advantages."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax import discriminator_update, metrics, segment_rows
from prism_jax.continuations import RowShape
from prism_jax.losses import advantage, pairwise
from prism_jax.rewards import workers
from prism_jax.stages import align_config, align_feed, responses, rollouts, segments, setup

Places = dict[str, discriminator_update.Scores]


def pack(
    asked: align_feed.Asked,
    drawn: rollouts.Drawn,
    feed: align_feed.Feed,
    shape: RowShape,
    judge: setup.Model,
) -> tuple[segment_rows.PackedSegments, Places]:
    """Lay the segments into rows, and say by name where the score of each will stand.

    Each teacher's come first, then those of well-formed responses. Equal segments of a prompt are
    scored once: rounding, which depends on a segment's place in its row, would else set them apart,
    and an advantage divides by how far a group's scores lie apart, however little that is.
    """
    own = feed.options.discriminator
    names = own.form.names
    responses = drawn.continuations()
    ok = np.array([one.format_ok for one in drawn.segments])
    cuts = {
        number: feed.reader.drawn(responses[number].tokens, drawn.segments[number])
        for number in np.flatnonzero(ok)
    }
    units, kinds, numbers = [], [], []
    known: dict[tuple[int, int, bytes], int] = {}
    for kind, name in enumerate(names):
        every = [*enumerate(asked.teachers)]
        every += [(responses[number].prompt, cut) for number, cut in cuts.items()]
        for prompt, cut in every:
            key = (kind, prompt, cut.tokens[name].tobytes())
            if key not in known:
                known[key] = len(units)
                units.append([segments.continuation(prompt, cut, name)])
                kinds.append(kind)
            numbers.append(known[key])
    # The units of a prompt stand together, so that a row holds few prompts.
    order = sorted(range(len(units)), key=lambda number: units[number][0].prompt)
    numbers = np.argsort(order)[numbers]
    packed = segment_rows.pack(
        asked.judged,
        [units[number] for number in order],
        [kinds[number] for number in order],
        own.form.kinds,
        shape,
        judge.config,
        positions=own.positions,
    )
    by_name = packed.indices()[numbers].reshape(len(names), -1)
    lengths = np.array([len(units[number][0].tokens) for number in order], np.int32)
    tokens = lengths[numbers]
    tokens = tokens.reshape(len(names), -1)
    return packed, {
        name: _places(by_name[number], tokens[number], ok, num_prompts=len(asked.teachers))
        for number, name in enumerate(names)
    }


def _places(
    indices: np.ndarray, tokens: np.ndarray, ok: np.ndarray, *, num_prompts: int
) -> discriminator_update.Scores:
    """Return the places of one name; those of malformed responses mean nothing."""
    student, student_tokens = np.zeros(len(ok), np.int32), np.zeros(len(ok), np.int32)
    student[ok], student_tokens[ok] = indices[num_prompts:], tokens[num_prompts:]
    return discriminator_update.Scores(
        teacher=indices[:num_prompts],
        student=student,
        is_pair=ok,
        teacher_tokens=tokens[:num_prompts],
        student_tokens=student_tokens,
    )


def make_advantages(
    options: align_config.Config,
) -> Callable[[discriminator_update.ByName, jax.Array, jax.Array | None], jax.Array]:
    """Return the jitted (scores, format_ok, accuracy) -> advantages, float32[responses].

    Scores count as the pair loss reads them: corrected for length, then clipped.
    """
    rollout, own = options.rollout, options.discriminator
    prompt_id = np.repeat(np.arange(rollout.num_prompts, dtype=np.int32), rollout.num_responses)
    compare = chosen(options.advantage, num_groups=rollout.num_prompts)
    betas = dict(own.length_beta)

    def advantages(
        found: discriminator_update.ByName, format_ok: jax.Array, accuracy: jax.Array | None
    ) -> jax.Array:
        by_segment = {}
        for name, one in found.items():
            _, student = pairwise.ready(
                one.segment(), beta=betas.get(name), score_clip=own.score_clip
            )
            # A response that was not scored but counts as valid has the released score of 0.
            by_segment[name] = jnp.where(one.is_pair, student, 0.0)
        return compare(
            advantage.AlignmentScores(
                prompt_id=jnp.asarray(prompt_id),
                by_segment=by_segment,
                format_ok=format_ok,
                accuracy=accuracy,
            )
        )

    return jax.jit(advantages)


def chosen(
    options: align_config.Advantage, *, num_groups: int
) -> Callable[[advantage.AlignmentScores], jax.Array]:
    """Return the advantage of `config.advantage.mode`: the one place where it is chosen."""
    shared = {"num_groups": num_groups, "eps": options.eps, "weights": options.weights}
    if options.mode == "align":
        return functools.partial(advantage.align, **shared, format_penalty=options.format_penalty)
    shared["align_coef"] = options.align_coef
    penalties = {
        "wrong_penalty": options.wrong_penalty,
        "format_penalty": options.format_penalty,
    }
    if options.mode == "acc_gating":
        return functools.partial(advantage.acc_gating, **shared, **penalties)
    if options.mode == "gated_align":
        return functools.partial(advantage.gated_align, **shared, **penalties)
    shared |= {
        "accuracy_weight": options.accuracy_weight,
        "format_weight": options.format_weight,
    }
    if options.mode == "rlvr":
        return functools.partial(advantage.rlvr, **shared)
    if options.mode == "rlvr_v2":
        return functools.partial(advantage.rlvr_v2, **shared, **penalties)
    return functools.partial(advantage.sign_align, **shared, **penalties)


def verify(
    options: align_config.Config,
    verifier: workers.JudgePool | None,
    asked: align_feed.Asked,
    drawn: rollouts.Drawn,
) -> tuple[np.ndarray, np.ndarray | None, metrics.Metrics]:
    """Return whose format counts as right, the accuracy that the advantage reads, and metrics."""
    own = options.advantage
    format_ok = np.array([one.format_ok for one in drawn.segments])
    if own.accuracy == "off":
        return format_ok, None, {}
    if own.accuracy == "nobody":
        return format_ok, np.ones(len(format_ok), np.float32), {}
    begun = time.monotonic()
    tasks = responses.tasks(asked.rows, drawn.segments, num_responses=options.rollout.num_responses)
    rewards = verifier.grade(tasks)
    accuracy = np.array([reward.accuracy for reward in rewards], np.float32)
    if own.format_of == "judge":
        format_ok = np.array([reward.format > 0 for reward in rewards])
    told = {
        "reward/accuracy_mean": rollouts.mean(accuracy),
        "time/judge_seconds": rollouts.mean([time.monotonic() - begun]),
    }
    return format_ok, accuracy, told


def columns(
    scores: Mapping[str, discriminator_update.Scores], advantages: np.ndarray
) -> dict[str, Sequence[Any]]:
    """Return what the dump says of each response beside its text."""
    each = len(advantages) // len(next(iter(scores.values())).teacher)
    told: dict[str, Sequence[Any]] = {"advantage": advantages}
    for name, one in scores.items():
        is_scored = zip(one.student, one.is_pair, strict=True)
        told[f"{name}_score"] = [score if ok else None for score, ok in is_scored]
        told[f"teacher_{name}_score"] = np.repeat(one.teacher, each)
    return told
