"""The kinds of sequences of a discriminator, and their separate experts and score heads.

    kind      sequence                      experts, router="segment"   score, heads=2
    whole     prompt + the whole response   all                         mean of both heads
    caption   prompt + caption              perception: 0 … E/2 - 1     head 0
    cot       prompt + think and answer     reasoning: E/2 … E - 1      head 1

With router="segment" every token of a sequence, including its prompt and pictures, goes only to the
experts of the sequence's kind: no gradient of a caption's score reaches a reasoning expert, nor one
of a cot's score a perception expert. With E/2 = X (the method's 4 experts, 2 per token) each token
goes to both experts of its kind, and the router only weighs them.

router="token" and heads=1 are the released model: any token may go to any expert, and one head
scores everything. `config.json` holds a discriminator's choices under a separate key, which
transformers ignores; without the key they are the released ones.

Source: PRISM moe/create_vl_moe.py:97-103 and moe/value_head.py:329-333 (token, 1); the paper's
"perception and reasoning experts" (segment, 2).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

Router = Literal["token", "segment"]
ROUTERS: tuple[Router, ...] = get_args(Router)
HEADS = (1, 2)

# Numbers of the kinds. Padding has no kind and counts for no expert.
WHOLE, CAPTION, COT = 0, 1, 2
NAMES = ("whole", "caption", "cot")

KEY = "prism_discriminator"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Apart:
    """The parts of a discriminator that are separate by kind; ValueError for an unknown choice."""

    router: str  # a Router
    heads: int

    def __post_init__(self):
        if self.router not in ROUTERS:
            raise ValueError(f"router must be one of {', '.join(ROUTERS)}, got {self.router!r:.80}")
        if type(self.heads) is not int or self.heads not in HEADS:
            raise ValueError(f"heads must be 1 or 2, got {self.heads!r:.80}")


RELEASED = Apart(router="token", heads=1)


def split(values: Mapping[str, Any]) -> tuple[Apart, dict[str, Any]]:
    """Return the choices under the key of a `config.json`, and its other values.

    Raises:
      ValueError: the key holds anything but one known router and a number of heads.
    """
    rest = {key: value for key, value in values.items() if key != KEY}
    choices = values.get(KEY)
    if choices is None:
        return RELEASED, rest
    if not isinstance(choices, Mapping) or set(choices) != {"router", "heads"}:
        raise ValueError(f"config.{KEY} must hold router and heads, got {choices!r:.80}")
    try:
        return Apart(router=choices["router"], heads=choices["heads"]), rest
    except ValueError as error:
        raise ValueError(f"config.{KEY}: {error}") from error


def entry(apart: Apart) -> dict[str, Any]:
    """Return the additional entry for `config.json`; none for the released choices."""
    return {} if apart == RELEASED else {KEY: dataclasses.asdict(apart)}


def check_experts(router: Router, *, num_experts: int, num_experts_per_token: int) -> None:
    """Raise ValueError when the experts cannot be split between caption and cot."""
    if router == "segment" and (num_experts % 2 or num_experts // 2 < num_experts_per_token):
        raise ValueError(
            "router = 'segment' gives half of the experts to captions and half to cots: "
            f"num_experts must be even and at least twice num_experts_per_token = "
            f"{num_experts_per_token}, got {num_experts}"
        )


def allowed(num_experts: int) -> np.ndarray:
    """Return bool[A, E]: the experts that a token may go to, by the kind of its sequence."""
    is_perception = np.arange(num_experts) < num_experts // 2
    table = np.ones((len(NAMES), num_experts), bool)
    table[CAPTION], table[COT] = is_perception, ~is_perception
    return table
