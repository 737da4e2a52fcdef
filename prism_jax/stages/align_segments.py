"""Alignment's segments: into rows to be scored, their scores by name, advantages, and back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax import discriminator_update
from prism_jax.continuations import Continuation, RowShape
from prism_jax.losses import advantage
from prism_jax.rewards import tags
from prism_jax.stages import align_config, align_feed, rollouts, segments, setup

ByName = Mapping[str, discriminator_update.Scores]


def pack(
    asked: align_feed.Asked, drawn: rollouts.Drawn, shape: RowShape, judge: setup.Model
) -> discriminator_update.PackedSegments:
    """Lay the segments into rows: each teacher's first, then those of well-formed responses."""
    units = [
        [segments.continuation(prompt, cut, name)]
        for name in segments.NAMES
        for prompt, cut in enumerate(asked.teachers)
    ]
    responses = drawn.continuations()
    for name in segments.NAMES:
        for response, one in zip(responses, drawn.segments, strict=True):
            if one.format_ok:
                cut = segments.Cut(tokens=response.tokens, caption_tokens=one.caption_tokens)
                units.append([Continuation(prompt=response.prompt, tokens=cut.segment(name))])
    return discriminator_update.pack(asked.judged, units, None, shape, judge.config)


def by_name(
    found: np.ndarray, responses: Sequence[tags.Segments], *, num_prompts: int
) -> dict[str, discriminator_update.Scores]:
    """Return the scores by name, from the order of `pack`; 0 where malformed."""
    ok = np.array([one.format_ok for one in responses])
    teachers, students = np.split(found, [len(segments.NAMES) * num_prompts])
    named = {}
    for number, name in enumerate(segments.NAMES):
        student = np.zeros(len(ok), np.float32)
        student[ok] = students.reshape(len(segments.NAMES), -1)[number]
        teacher = teachers.reshape(len(segments.NAMES), -1)[number]
        named[name] = discriminator_update.Scores(teacher=teacher, student=student, is_pair=ok)
    return named


def in_order(pulls: ByName, responses: Sequence[tags.Segments]) -> np.ndarray:
    """Return gradients by name in the order of `pack`: the inverse of `by_name`."""
    ok = np.array([one.format_ok for one in responses])
    teachers = [pulls[name].teacher for name in segments.NAMES]
    return np.concatenate([*teachers, *(pulls[name].student[ok] for name in segments.NAMES)])


def make_advantages(
    options: align_config.Config,
) -> Callable[[ByName], jax.Array]:
    """Return the jitted scores -> advantages, float32[prompts x responses]."""
    rollout, clip = options.rollout, options.discriminator.score_clip
    prompt_id = np.repeat(np.arange(rollout.num_prompts, dtype=np.int32), rollout.num_responses)

    def advantages(found: ByName) -> jax.Array:
        caption, cot = (
            found[name].student if clip is None else found[name].student.clip(-clip, clip)
            for name in segments.NAMES
        )
        scores = advantage.AlignmentScores(
            prompt_id=jnp.asarray(prompt_id),
            caption=caption,
            cot=cot,
            format_ok=found[segments.NAMES[0]].is_pair,
            accuracy=None,
        )
        return advantage.align(
            scores,
            num_groups=rollout.num_prompts,
            eps=options.advantage.eps,
            caption_weight=options.advantage.caption_weight,
            cot_weight=options.advantage.cot_weight,
            format_penalty=options.advantage.format_penalty,
        )

    return jax.jit(advantages)


def columns(scores: ByName, advantages: np.ndarray) -> dict[str, Sequence[Any]]:
    """Return what the dump says of each response beside its text."""
    each = len(advantages) // len(next(iter(scores.values())).teacher)
    told: dict[str, Sequence[Any]] = {"advantage": advantages}
    for name, one in scores.items():
        is_scored = zip(one.student, one.is_pair, strict=True)
        told[f"{name}_score"] = [score if ok else None for score, ok in is_scored]
        told[f"teacher_{name}_score"] = np.repeat(one.teacher, each)
    return told
