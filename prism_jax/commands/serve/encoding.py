"""Prompts of requests as the model's examples, made in threads beside the event loop."""

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import Sequence

from models.inputs import Example
from prism_jax import errors
from prism_jax.commands.serve import pictures as pictures_lib
from prism_jax.commands.serve.chat_request import Prompt
from prism_jax.commands.serve.refusals import Refusal
from prism_jax.data import chat, examples, processor
from prism_jax.rollout import prefill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """The largest prompt."""

    tokens: int
    patches: int
    images: int

    @classmethod
    def of(cls, tokens: int, num_images: int, words: processor.Processor) -> "Room":
        """Return the room of prompts of `tokens` tokens; a token of a picture has its patches."""
        merge = words.image_settings.merge_size
        return cls(tokens=tokens, patches=tokens * merge**2, images=num_images)


class Encoder:
    """The rule that turns prompts into examples."""

    def __init__(
        self,
        words: processor.Processor,
        *,
        room: Room,
        longest_bytes: int,
        pictures: pictures_lib.Rules,
        threads: concurrent.futures.Executor,
    ):
        """Store the parts.

        Args:
          longest_bytes: of a token, to refuse texts that are too long before they are cut.
        """
        self._words, self._room, self._longest_bytes = words, room, longest_bytes
        self._pictures, self._threads = pictures, threads

    async def encode(self, prompt: Prompt, *, sees_images: bool = True) -> Example:
        """Return the example of a prompt.

        Args:
          sees_images: False leaves out the pictures.

        Raises:
          Refusal: a picture or a turn is wrong, or the prompt is too long.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode, prompt, sees_images)

    def _encode(self, prompt: Prompt, sees_images: bool) -> Example:
        if prompt.num_chars() > self._room.tokens * self._longest_bytes:
            raise self._too_long(f"more than {self._room.tokens}")
        messages: Sequence[chat.Message] = prompt.messages
        pictures = pictures_lib.Opened(prompt.pictures, self._pictures)
        if not sees_images:
            messages = [m | {"content": _texts(m["content"])} for m in messages]
            pictures = ()
        try:
            encoded = self._words.encode(messages, images=pictures, add_generation_prompt=True)
        except errors.InputError as error:
            raise Refusal(str(error), field="messages", code="invalid_value") from None
        example = examples.from_encoded(encoded, self._words)
        tokens, patches, _ = prefill.measure(example)
        if tokens > self._room.tokens or patches > self._room.patches:
            raise self._too_long(str(tokens))
        return example

    def _too_long(self, tokens: str) -> Refusal:
        return Refusal(
            f"messages must have at most {self._room.tokens} tokens, those of the pictures "
            f"included, got {tokens}",
            field="messages",
            code="context_length_exceeded",
        )


def _texts(parts: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [part for part in parts if part["type"] == "text"]
