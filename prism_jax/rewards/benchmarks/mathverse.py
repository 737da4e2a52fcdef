"""MathVerse: the text of the answer, without regard to case and a final period.

Source: PRISM scripts/eval/tasks/mathverse/utils.py. In lmms-eval a model alone decides; without one
the whole response is compared by the same rule.
"""

from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.rewards.benchmarks import reading


def read(facts: facts_lib.Facts, response: str) -> reading.Reading:
    """Read a response."""
    text = reading.tagged(response.strip())
    if text is None:
        if facts.protocol == "prism":
            return reading.Reading(answer="", is_right=False, how="none")
        text = response.strip()
    return reading.Reading(answer=text, is_right=_plain(text) == _plain(facts.answer), how="exact")


def _plain(text: str) -> str:
    return text.strip().lower().rstrip(".")
