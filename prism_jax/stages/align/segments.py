"""Alignment's segments: into rows to be scored, their places by name, and advantages."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import segments
from prism_jax.policy import rollouts
from prism_jax.rows import RowShape
from prism_jax.setup import models as setup_models
from prism_jax.stages.align import feed as align_feed

Places = dict[str, discriminator_loss.Scores]


def pack(
    asked: align_feed.Asked,
    drawn: rollouts.Drawn,
    feed: align_feed.Feed,
    shape: RowShape,
    discriminator: setup_models.Model,
) -> tuple[discriminator_batch.PackedSegments, Places]:
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
    packed = discriminator_batch.pack(
        asked.discriminator_prompts,
        units,
        kinds,
        own.form.kinds,
        shape,
        discriminator.config,
        positions=own.positions,
    )
    by_name = packed.indices()[numbers].reshape(len(names), -1)
    tokens = np.array([len(units[number][0].tokens) for number in numbers], np.int32)
    tokens = tokens.reshape(len(names), -1)
    return packed, {
        name: _places(by_name[number], tokens[number], ok, num_prompts=len(asked.teachers))
        for number, name in enumerate(names)
    }


def _places(
    indices: np.ndarray, tokens: np.ndarray, ok: np.ndarray, *, num_prompts: int
) -> discriminator_loss.Scores:
    """Return the places of one name; those of malformed responses mean nothing."""
    student, student_tokens = np.zeros(len(ok), np.int32), np.zeros(len(ok), np.int32)
    student[ok], student_tokens[ok] = indices[num_prompts:], tokens[num_prompts:]
    return discriminator_loss.Scores(
        teacher=indices[:num_prompts],
        student=student,
        is_pair=ok,
        teacher_tokens=tokens[:num_prompts],
        student_tokens=student_tokens,
    )


def columns(
    scores: Mapping[str, discriminator_loss.Scores], advantages: np.ndarray
) -> dict[str, Sequence[Any]]:
    """Return what the dump says of each response beside its text."""
    each = len(advantages) // len(next(iter(scores.values())).teacher)
    told: dict[str, Sequence[Any]] = {"advantage": advantages}
    for name, one in scores.items():
        is_scored = zip(one.student, one.is_pair, strict=True)
        told[f"{name}_score"] = [score if ok else None for score, ok in is_scored]
        told[f"teacher_{name}_score"] = np.repeat(one.teacher, each)
    return told
