"""The request to a teacher: a row's turns under the project's system prompt, and its hash."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from prism_jax.data import data_urls, prompts, records

Json = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The parts that all requests share."""

    model: str
    instruction: str  # follows the system prompt; the student never sees it
    options: Mapping[str, Json]  # for sampling, by the endpoint's names


def key(row: records.PromptRow, settings: Settings, *, try_number: int) -> str:
    """Return the SHA-256 of all that a reply depends on, the bytes of pictures included."""
    plain = _body(row, settings, lambda image: hashlib.sha256(image.data).hexdigest())
    text = json.dumps({"request": plain, "try": try_number}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def body(row: records.PromptRow, settings: Settings) -> bytes:
    """Return the request in the endpoint's format, with pictures as data URLs.

    Source: OpenAI API reference, "Create chat completion".
    """
    return json.dumps(_body(row, settings, data_urls.data_url)).encode()


def student_prompt(row: records.PromptRow) -> tuple[records.Message, ...]:
    """Return the turns of a row with the published system prompt in place of the row's."""
    turns = (turn for turn in row.prompt if turn.role != "system")
    return (records.Message(role="system", content=prompts.SYSTEM_PROMPT), *turns)


def _body(
    row: records.PromptRow, settings: Settings, show: Callable[[records.Image], str]
) -> dict[str, Json]:
    system, *turns = student_prompt(row)
    instructions = system.content + (f"\n{settings.instruction}\n" if settings.instruction else "")
    images = list(row.images)
    messages: list[dict[str, Json]] = [{"role": "system", "content": instructions}]
    messages += [{"role": t.role, "content": _content(t.content, images, show)} for t in turns]
    return {"model": settings.model, "messages": messages, **settings.options}


def _content(
    text: str, images: list[records.Image], show: Callable[[records.Image], str]
) -> str | list[dict[str, Json]]:
    """Return a turn's text, or with pictures (popped from `images`) a list of parts."""
    first, *rest = text.split(records.IMAGE_MARK)
    if not rest:
        return text.strip()
    parts = [_text_part(first)]
    for piece in rest:
        parts.append({"type": "image_url", "image_url": {"url": show(images.pop(0))}})
        parts.append(_text_part(piece))
    return [part for part in parts if part["type"] == "image_url" or part["text"]]


def _text_part(text: str) -> dict[str, Json]:
    return {"type": "text", "text": text.strip()}
