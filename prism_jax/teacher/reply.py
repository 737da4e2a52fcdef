"""Read the reply of a chat endpoint: its text, why it ended, and what was counted."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

Json = Any
# Why a reply ended: by itself, at the limit of tokens, or because the endpoint withheld it.
Finish = Literal["stop", "length", "filter"]

_MAX_TOKENS = 10**12  # more is no count
_LENGTH = ("length", "max_tokens")
_FILTER = ("content_filter", "safety", "refusal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """Hold the tokens of one reply as the endpoint counted them."""

    input_tokens: int
    output_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """Hold one reply. `usage` is None where the endpoint does not tell it."""

    text: str
    finish: Finish
    model: str | None  # as the endpoint names it
    usage: Usage | None


class UnusableError(ValueError):
    """Say why a reply holds no text to use; `usage` is what it cost all the same."""

    def __init__(self, message: str, *, is_json: bool, usage: Usage | None):
        super().__init__(message)
        self.is_json = is_json
        self.usage = usage


def parse(data: bytes) -> Reply:
    """Return the first choice of a chat completion.

    Raises:
      UnusableError: not JSON, another structure, or no choice.

    Source: OpenAI API reference, "The chat completion object".
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnusableError(
            f"{len(data)} bytes are not JSON: {error}", is_json=False, usage=None
        ) from error
    if not isinstance(found, dict):
        raise UnusableError("JSON, but no object", is_json=False, usage=None)
    usage = _usage(found.get("usage"))
    choices = found.get("choices")
    if not isinstance(choices, list) or not choices:
        told = message_of(found) or "no choices"
        raise UnusableError(told, is_json=True, usage=usage)
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise UnusableError("the first choice has no message", is_json=True, usage=usage)
    text = _text(message.get("content"))
    finish = _finish(choice.get("finish_reason"), message)
    if text is None:
        if finish == "stop":
            raise UnusableError("the first choice has no content", is_json=True, usage=usage)
        text = ""
    model = found.get("model")
    return Reply(
        text=text,
        finish=finish,
        model=_whole(model) if isinstance(model, str) else None,
        usage=usage,
    )


def _whole(text: str) -> str:
    """Return text with a mark for halves of character pairs, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


def message_of(found: Json) -> str | None:
    """Return the endpoint's own words about an error, where a body has them."""
    if isinstance(found, list) and found:
        found = found[0]
    error = found.get("error") if isinstance(found, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return _whole(message) if isinstance(message, str) else None


def _text(content: Json) -> str | None:
    """Return the text of a content, which some endpoints give in parts; None when there is none."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) and content else None


def _finish(reason: Json, message: Mapping[str, Json]) -> Finish:
    name = reason.lower() if isinstance(reason, str) else ""
    if name in _LENGTH:
        return "length"
    return "filter" if name in _FILTER or message.get("refusal") else "stop"


def _usage(found: Json) -> Usage | None:
    """Return the counts; tokens of hidden reasoning are part of the output.

    Some endpoints leave those out of `completion_tokens` and count them in `total_tokens` alone.
    """
    if not isinstance(found, dict):
        return None
    counts = [found.get(f"{name}_tokens") for name in ("prompt", "completion", "total")]
    given, written, total = (
        c if type(c) is int and 0 <= c <= _MAX_TOKENS else None for c in counts
    )
    if given is None or written is None:
        return None
    hidden = 0 if total is None else total - given - written
    return Usage(input_tokens=given, output_tokens=written + max(0, hidden))
