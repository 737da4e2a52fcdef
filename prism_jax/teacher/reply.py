"""The reply of a chat endpoint: its text, the reason it ended, and its token counts."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

Json = Any
# Why a reply ended: by itself, at the token limit, or withheld by the endpoint.
Finish = Literal["stop", "length", "filter"]

_MAX_TOKENS = 10**12  # a larger number cannot be a count
_LENGTH = ("length", "max_tokens")
_FILTER = ("content_filter", "safety", "refusal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """The token counts of a reply, as the endpoint states them."""

    input_tokens: int
    output_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply; `usage` is None if the endpoint does not state it."""

    text: str
    finish: Finish
    model: str | None  # as the endpoint names it
    usage: Usage | None


class UnusableError(ValueError):
    """A reply without usable text; `usage` is its cost nevertheless."""

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
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnusableError(
            f"{len(data)} bytes are not JSON: {error}", is_json=False, usage=None
        ) from error
    if not isinstance(body, dict):
        raise UnusableError("JSON, but no object", is_json=False, usage=None)
    usage = _usage(body.get("usage"))
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        error_message = message_of(body) or "no choices"
        raise UnusableError(error_message, is_json=True, usage=usage)
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
    model = body.get("model")
    return Reply(
        text=text,
        finish=finish,
        model=_whole(model) if isinstance(model, str) else None,
        usage=usage,
    )


def _whole(text: str) -> str:
    """Return text with lone surrogates replaced: UTF-8 cannot encode them."""
    return text.encode("utf-8", "replace").decode()


def message_of(body: Json) -> str | None:
    """Return the error message in a body, None if there is none."""
    if isinstance(body, list) and body:
        body = body[0]
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return _whole(message) if isinstance(message, str) else None


def _text(content: Json) -> str | None:
    """Return the text of a content, which may be in parts; None if there is none."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) and content else None


def _finish(reason: Json, message: Mapping[str, Json]) -> Finish:
    name = reason.lower() if isinstance(reason, str) else ""
    if name in _LENGTH:
        return "length"
    return "filter" if name in _FILTER or message.get("refusal") else "stop"


def _usage(stated: Json) -> Usage | None:
    """Return the token counts; tokens of hidden reasoning count as output.

    Some endpoints count them in `total_tokens` but not in `completion_tokens`.
    """
    if not isinstance(stated, dict):
        return None
    counts = [stated.get(f"{name}_tokens") for name in ("prompt", "completion", "total")]
    input_tokens, output_tokens, total_tokens = (
        c if type(c) is int and 0 <= c <= _MAX_TOKENS else None for c in counts
    )
    if input_tokens is None or output_tokens is None:
        return None
    hidden = 0 if total_tokens is None else total_tokens - input_tokens - output_tokens
    return Usage(input_tokens=input_tokens, output_tokens=output_tokens + max(0, hidden))
