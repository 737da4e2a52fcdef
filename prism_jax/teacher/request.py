"""What a teacher is asked: a row's turns under the project's system prompt, and their hash."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from prism_jax.data import data_urls, prompts, records

Json = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """Say what is the same in all requests."""

    model: str
    instruction: str  # follows the system prompt; the student never sees it
    options: Mapping[str, Json]  # of sampling, as the endpoint calls them


def key(row: records.PromptRow, asking: Asking, *, try_number: int) -> str:
    """Return the SHA-256 of everything that a reply depends on, the pictures' bytes included."""
    plain = _body(row, asking, lambda image: hashlib.sha256(image.data).hexdigest())
    text = json.dumps({"request": plain, "try": try_number}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def body(row: records.PromptRow, asking: Asking) -> bytes:
    """Return the request as an endpoint reads it, pictures as data URLs.

    Source: OpenAI API reference, "Create chat completion".
    """
    return json.dumps(_body(row, asking, data_urls.data_url)).encode()


def student_prompt(row: records.PromptRow) -> tuple[records.Message, ...]:
    """Return the turns of a row under the published system prompt, whatever theirs was."""
    turns = (turn for turn in row.prompt if turn.role != "system")
    return (records.Message(role="system", content=prompts.SYSTEM_PROMPT), *turns)


def _body(
    row: records.PromptRow, asking: Asking, show: Callable[[records.Image], str]
) -> dict[str, Json]:
    system, *turns = student_prompt(row)
    told = system.content + (f"\n{asking.instruction}\n" if asking.instruction else "")
    left = list(row.images)
    messages: list[dict[str, Json]] = [{"role": "system", "content": told}]
    messages += [{"role": t.role, "content": _content(t.content, left, show)} for t in turns]
    return {"model": asking.model, "messages": messages, **asking.options}


def _content(
    text: str, left: list[records.Image], show: Callable[[records.Image], str]
) -> str | list[dict[str, Json]]:
    """Return a turn's text; with pictures, which are taken from `left`, a list of parts."""
    first, *rest = text.split(records.IMAGE_MARK)
    if not rest:
        return text.strip()
    parts = [_text_part(first)]
    for piece in rest:
        parts.append({"type": "image_url", "image_url": {"url": show(left.pop(0))}})
        parts.append(_text_part(piece))
    return [part for part in parts if part["type"] == "image_url" or part["text"]]


def _text_part(text: str) -> dict[str, Json]:
    return {"type": "text", "text": text.strip()}
