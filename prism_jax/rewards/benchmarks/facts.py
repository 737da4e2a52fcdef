"""All that a scorer knows of a question, as it is kept in a row's `extra_info`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from prism_jax import errors

Json = Any
Protocol = Literal["prism", "upstream"]
PROTOCOLS = ("prism", "upstream")
# The key of `extra_info`.
KEY = "benchmark"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts about a question."""

    name: str  # of the benchmark
    protocol: Protocol
    question: str  # as a model that judges answers reads it; may be empty
    answer: str
    answer_type: str  # the benchmark's word, "" if it has none
    choices: tuple[str, ...]  # texts of the options, in order; empty for an open question
    precision: int | None  # decimal places of a number
    group: Mapping[str, str]  # names the questions that are scored together
    max_tokens: int  # of a response, as the protocol limits it

    def to_json(self) -> dict[str, Json]:
        """Return the facts as JSON values."""
        return dataclasses.asdict(self) | {"choices": list(self.choices), "group": dict(self.group)}


_TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "protocol": str,
    "question": str,
    "answer": str,
    "answer_type": str,
    "choices": list,
    "precision": (int, type(None)),
    "group": dict,
    "max_tokens": int,
}


def read(extra_info: Mapping[str, Json], *, place: str) -> Facts | None:
    """Return the facts in a row's `extra_info`, None for a row that is of no benchmark.

    Raises:
      InputError: they are not as `Facts.to_json` wrote them.
    """
    content = extra_info.get(KEY)
    if content is None:
        return None
    if not isinstance(content, Mapping) or content.keys() != _TYPES.keys():
        raise errors.InputError(f"{place}: extra_info.{KEY} must hold {', '.join(_TYPES)}")
    for name, kind in _TYPES.items():
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise errors.InputError(
                f"{place}: extra_info.{KEY}.{name} has a wrong type: {content[name]!r:.60}"
            )
    if content["protocol"] not in PROTOCOLS:
        raise errors.InputError(
            f"{place}: extra_info.{KEY}.protocol must be one of {', '.join(PROTOCOLS)}, "
            f"got {content['protocol']!r:.60}"
        )
    return Facts(**{**content, "choices": tuple(content["choices"])})
