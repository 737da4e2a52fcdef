"""The scorer of a row: by which file a response is read, and what a model is asked afterwards."""

from collections.abc import Callable, Mapping
from typing import Literal

from prism_jax import errors
from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.rewards.benchmarks import (
    hallusion,
    mathverse,
    mathvision,
    mathvista,
    mmmu,
    reading,
    wemath,
)

Rule = Callable[[facts_lib.Facts, str], reading.Reading]
RULES: Mapping[str, Rule] = {
    "mathvista": mathvista.read,
    "mathvision": mathvision.read,
    "mathverse": mathverse.read,
    "wemath": wemath.read,
    "mmmu": mmmu.read,
    "mmmu_pro_standard": mmmu.read,
    mmmu.VISION: mmmu.read,
    "hallusion": hallusion.read,
}
# What a model is asked: to extract the answer, whether the response is right, or whether it is
# right, wrong or unclear.
Question = Literal["extract", "right", "clear"]


def read(facts: facts_lib.Facts, response: str) -> reading.Reading:
    """Read a response by the rule of its benchmark."""
    rule = RULES.get(facts.name)
    if rule is None:
        raise errors.InputError(
            f"the benchmark must be one of {', '.join(RULES)}, got {facts.name!r:.60}"
        )
    return rule(facts, response)


def question(facts: facts_lib.Facts, read: reading.Reading, *, is_right: bool) -> Question | None:
    """Return the question of the published scorer to a model after the rules, None without one.

    PRISM asks about every response that its rules call wrong, and about HallusionBench where they
    decide nothing. lmms-eval leaves MathVerse and HallusionBench to the model alone, has it extract
    MathVista's answers, and asks about wrong answers in We-Math.
    """
    is_open = read.how in ("loose", "none")
    if facts.name == "mathvista" and is_open:
        return "extract"
    if facts.name == "hallusion":
        return "clear" if is_open or facts.protocol == "upstream" else None
    if facts.protocol == "upstream":
        if facts.name == "mathverse":
            return "right"
        return "right" if facts.name == "wemath" and not is_right else None
    return None if is_right else "right"
