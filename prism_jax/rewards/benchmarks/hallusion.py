"""HallusionBench: yes or no.

Source: PRISM scripts/eval/tasks/hallusion_bench/evaluate_hb.py. In lmms-eval a model alone decides;
without one the same rule reads the whole response.
"""

from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.rewards.benchmarks import reading

_YES = ("yes", "correct", "true", "right")
_NO = ("no", "incorrect", "false", "wrong")
_AFTER = (",", ".", " ")


def read(facts: facts_lib.Facts, response: str) -> reading.Reading:
    """Read a response; the answer is "1" for yes and "0" for no."""
    text = reading.tagged_or_all(response) if facts.protocol == "prism" else response
    text = text.lower().strip().rstrip(".")
    answer = ""
    if text in _YES or text.startswith(tuple("yes" + sign for sign in _AFTER)):
        answer = "1"
    elif text in _NO or text.startswith(tuple("no" + sign for sign in _AFTER)):
        answer = "0"
    return reading.Reading(
        answer=answer,
        is_right=answer == facts.answer,
        how="exact" if answer else "none",
    )
