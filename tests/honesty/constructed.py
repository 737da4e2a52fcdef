"""Constructed pairs and discriminators for the tests of the honesty panel."""

import numpy as np

from models import kinds
from prism_jax.honesty import panel as honesty_panel
from prism_jax.rows import Continuation
from tests.models import cases

SEGMENTS = ("caption", "cot")
KINDS = (kinds.CAPTION, kinds.COT)


def pairs(num_prompts=12, num_responses=2, *, longer=0, teacher_last=7, student_last=7):
    """Return pairs: teachers have `longer` tokens more, sides end with these tokens."""
    rng = np.random.default_rng(0)
    prompts = [
        cases.example(f"p{n}", 2, ("image", (1, 4, 4 if n % 2 else 6)), 3)
        for n in range(num_prompts)
    ]
    units, names = [], []
    for prompt in range(num_prompts):
        for _ in range(num_responses):
            for name in range(len(SEGMENTS)):
                size = rng.integers(5, 30)
                sides = []
                for extra, last in ((longer, teacher_last), (0, student_last)):
                    tokens = rng.integers(1, 100, size + extra).astype(np.int32)
                    tokens[-1] = last
                    sides.append(Continuation(prompt=prompt, tokens=tokens))
                units.append(sides)
                names.append(name)
    return honesty_panel.Pairs(
        prompts=prompts,
        units=units,
        names=names,
        is_cut=[name == 1 for name in names],
        segments=SEGMENTS,
        kinds=KINDS,
    )


def discriminator(score, *, count=None, sees_images=True, keeps_apart=False):
    """Return a discriminator that gives each side of each pair `score(prompt, tokens, kind)`."""

    def scores(pairs: honesty_panel.Pairs) -> np.ndarray:
        return np.array(
            [
                [score(pairs.prompts[s.prompt], s.tokens, pairs.kinds[name]) for s in unit]
                for unit, name in zip(pairs.units, pairs.names, strict=True)
            ],
            np.float32,
        )

    return honesty_panel.Discriminator(
        score=scores,
        count=count,
        sees_images=sees_images,
        keeps_apart=keeps_apart,
        spatial_merge_size=2,
    )


def measure(pairs, discriminator, **changes):
    """Return what the panel measures of a discriminator on pairs."""
    options = {"known": None, "fitted": None, "num_pairs": 100}
    return honesty_panel.measure(pairs, discriminator, **(options | changes))


def length(prompt, tokens, kind):
    """Score a segment by its length."""
    return float(len(tokens))


def brightness(prompt, tokens, kind):
    """Look at the picture: how far is the caption's first token from the mean of the pixels?"""
    return -abs(float(prompt.pixels[0].mean()) - tokens[0] / 100)
