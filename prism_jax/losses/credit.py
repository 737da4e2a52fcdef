"""The weights with which the segments' scores reach the tokens of each part of a response."""

from collections.abc import Mapping
from typing import Literal

Credit = Literal["response", "segment", "segment_shared"]


def weights_by_part(credit: Credit, weights: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the weight of each segment's normalised scores in the advantage of each part.

                        tokens of the caption      of think and answer
        response        w_caption, w_cot           w_caption, w_cot         the sum, as released
        segment         2 w_caption                2 w_cot
        segment_shared  2 w_caption, w_cot         2 w_cot

    A token learns from one segment in place of two, so the weight is doubled: with equal weights
    both sums are the same. In `segment_shared` the caption also gets half of the weight of the
    reasoning that rests on it. All else, such as penalties, gates and the score of the whole
    response, stands on every token. "response" is always there: a malformed response has no parts.
    """
    whole = dict(weights)
    if credit == "response":
        return {"response": whole}
    shared = whole["cot"] if credit == "segment_shared" else 0.0
    return {
        "response": whole,
        "caption": whole | {"caption": 2 * whole["caption"], "cot": shared},
        "cot": whole | {"caption": 0.0, "cot": 2 * whole["cot"]},
    }
