"""The fields of a chat completion, read and checked."""

import dataclasses
from typing import Any

from prism_jax.commands.serve import fields as fields_lib
from prism_jax.commands.serve.fields import Fields
from prism_jax.commands.serve.refusals import Refusal
from prism_jax.data import chat

_ROLES = ("system", "developer", "user", "assistant")
_MOST_STOPS = 16
_STOP_CHARS = 1000
_MOST_SEED = 2**32 - 1
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 0.01, 2.0
_MOST_TOP_K = 1024

# Of OpenAI's API: fields that the server does not have, with the values that switch them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),  # there are no tools to call
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),  # the sampler returns those of the drawn tokens alone
    "web_search_options": (),
}
# Of a message that a client got from a server and sends back.
_MESSAGE_OFF: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_calls": ([],),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest values of a request."""

    num_responses: int
    max_tokens: int  # of a response
    num_images: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """The address of a picture."""

    url: str
    field: str  # the place in the request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Chat messages, with an image part for each picture."""

    messages: tuple[chat.Message, ...]
    pictures: tuple[Picture, ...]

    def num_chars(self) -> int:
        """Return the characters of all texts."""
        parts = [part for message in self.messages for part in message["content"]]
        return sum(len(part.get("text", "")) for part in parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A chat completion."""

    prompt: Prompt
    num_responses: int
    max_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int | None  # None: another one for each request
    stops: tuple[str, ...]
    with_logprobs: bool
    is_stream: bool
    with_usage: bool  # a last event with the usage

    @classmethod
    def of(cls, value: Any, *, name: str, limits: Limits) -> "ChatRequest":
        """Read a request to the model of this name.

        Raises:
          Refusal: a field is wrong, or is none of the server's.
        """
        fields = Fields(value, "")
        take_model(fields, name)
        prompt = read_prompt(fields, limits)
        # The text that names the client's user changes no answer.
        fields.text("user")
        is_stream = fields.boolean("stream")
        request = cls(
            prompt=prompt,
            num_responses=fields.integer("n", 1, limits.num_responses) or 1,
            max_tokens=_max_tokens(fields, limits),
            temperature=_temperature(fields),
            top_p=_top_p(fields),
            top_k=fields.integer("top_k", 1, _MOST_TOP_K),
            seed=fields.integer("seed", 0, _MOST_SEED),
            stops=_stops(fields),
            with_logprobs=fields.boolean("logprobs"),
            is_stream=is_stream,
            with_usage=_with_usage(fields, is_stream),
        )
        for field, values in _OFF.items():
            fields.off(field, *values)
        fields.close()
        return request


def take_model(fields: Fields, name: str) -> None:
    """Take the field `model`, which must be the name of this route's model."""
    model = fields.checked_text("model", fields.needed("model"))
    if model != name:
        shown = fields_lib.show(model)
        raise Refusal(
            f"model must be {name!r}, got {shown}",
            status=404,
            field="model",
            code="model_not_found",
        )


def read_prompt(fields: Fields, limits: Limits) -> Prompt:
    """Take the field `messages`."""
    values = fields.needed("messages")
    if not isinstance(values, list) or not values:
        raise fields.refusal(
            "messages", f"must be a list of messages, got {fields_lib.show(values)}"
        )
    pictures: list[Picture] = []
    messages = tuple(_message(x, f"messages[{n}]", pictures) for n, x in enumerate(values))
    if len(pictures) > limits.num_images:
        raise fields.refusal(
            "messages", f"must hold at most {limits.num_images} pictures, got {len(pictures)}"
        )
    return Prompt(messages=messages, pictures=tuple(pictures))


def checked(fields: Fields, field: str, value: Any) -> str:
    """Return a text that a model reads; it may hold no token that the chat template writes."""
    text = fields.checked_text(field, value)
    for token in chat.RESERVED_TOKENS:
        if token in text:
            raise fields.refusal(field, f"must not contain the special token {token}")
    return text


def _message(value: Any, place: str, pictures: list[Picture]) -> chat.Message:
    """Return a message with a list of parts; its pictures are added to `pictures`."""
    fields = Fields(value, place)
    if fields.needed("role") not in _ROLES:
        raise fields.refusal("role", f"must be one of {', '.join(_ROLES)}")
    # OpenAI's newer name of the same turn.
    role = "system" if value["role"] == "developer" else value["role"]
    content = fields.needed("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": checked(fields, "content", content)}]
    elif isinstance(content, list) and content:
        content = [_part(x, f"{place}.content[{n}]", pictures) for n, x in enumerate(content)]
    else:
        raise fields.refusal("content", "must be a text or a list of parts")
    for name, values in _MESSAGE_OFF.items():
        fields.off(name, *values)
    fields.close()
    return {"role": role, "content": content}


def _part(value: Any, place: str, pictures: list[Picture]) -> dict[str, str]:
    fields = Fields(value, place)
    kind = fields.needed("type")
    if kind == "text":
        part = {"type": "text", "text": checked(fields, "text", fields.needed("text"))}
    elif kind == "image_url":
        inner = Fields(fields.needed("image_url"), fields.name("image_url"))
        url = inner.checked_text("url", inner.needed("url"))
        pictures.append(Picture(url=url, field=inner.name("url")))
        inner.off("detail", "auto")
        inner.close()
        part = {"type": "image"}
    else:
        raise fields.refusal("type", f"must be text or image_url, got {fields_lib.show(kind)}")
    fields.close()
    return part


def _max_tokens(fields: Fields, limits: Limits) -> int:
    """Return the limit of a response, under either of its names."""
    names = ("max_completion_tokens", "max_tokens")
    newer, older = (fields.integer(name, 1, limits.max_tokens) for name in names)
    if newer is not None and older is not None and newer != older:
        raise fields.refusal(
            "max_tokens", f"must be max_completion_tokens = {newer} where both are set, got {older}"
        )
    return newer or older or limits.max_tokens


def _temperature(fields: Fields) -> float:
    value = fields.number("temperature", 0, _MOST_TEMPERATURE)
    if value is not None and 0 < value < _LEAST_TEMPERATURE:
        # Logits divided by less may leave the range of float32.
        raise fields.refusal(
            "temperature", f"must be 0 or at least {_LEAST_TEMPERATURE}, got {value}"
        )
    return 1.0 if value is None else value


def _top_p(fields: Fields) -> float | None:
    value = fields.number("top_p", 0, 1)
    if value == 0:
        raise fields.refusal("top_p", "must be above 0; temperature 0 takes the likeliest token")
    return value


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS:
        raise fields.refusal("stop", f"must be a text or at most {_MOST_STOPS} texts")
    for number, stop in enumerate(stops):
        if not 0 < len(fields.checked_text(f"stop[{number}]", stop)) <= _STOP_CHARS:
            raise fields.refusal(
                f"stop[{number}]", f"must have between 1 and {_STOP_CHARS} characters"
            )
    return tuple(stops)


def _with_usage(fields: Fields, is_stream: bool) -> bool:
    value = fields.take("stream_options")
    if value is None:
        return False
    if not is_stream:
        raise fields.refusal("stream_options", "needs stream = true")
    options = Fields(value, "stream_options")
    with_usage = options.boolean("include_usage")
    options.off("include_obfuscation", False)
    options.close()
    return with_usage
