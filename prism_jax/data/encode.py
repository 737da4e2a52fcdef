"""Encode rows for the model: marks become pictures, and response tokens are marked."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import transformers

from models import inputs
from prism_jax import errors
from prism_jax.data import chat, examples, images, processor, records

_END = "<|im_end|>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of a sequence, which count against its row's limits."""

    tokens: int
    patches: int
    images: int


def messages(turns: Sequence[records.Message]) -> list[chat.Message]:
    """Return chat messages, with an image part in place of each mark of a picture."""
    chat_messages = []
    for turn in turns:
        content: str | list[dict[str, str]] = turn.content
        if records.IMAGE_MARK in turn.content:
            content = []
            for number, text in enumerate(turn.content.split(records.IMAGE_MARK)):
                content += [{"type": "image"}] if number else []
                content += [{"type": "text", "text": text}] if text else []
        chat_messages.append({"role": turn.role, "content": content})
    return chat_messages


def example(
    turns: Sequence[records.Message],
    pictures: Sequence[records.Image],
    words: processor.Processor,
    *,
    add_generation_prompt: bool,
) -> inputs.Example:
    """Encode the turns of a validated row.

    Raises:
      InputError: as `Processor.encode` and `images.open_image`.
    """
    encoded = words.encode(
        messages(turns),
        images=[images.open_stored(picture) for picture in pictures],
        scales=[picture.scale for picture in pictures],
        add_generation_prompt=add_generation_prompt,
    )
    return examples.from_encoded(encoded, words)


def measure(
    turns: Sequence[records.Message],
    pictures: Sequence[records.Image],
    words: processor.Processor,
    *,
    add_generation_prompt: bool,
) -> Size:
    """Return the size of `example` for the same arguments, without decoding a picture."""
    text = chat.render(
        words.tokenizer,
        words.template,
        messages(turns),
        add_generation_prompt=add_generation_prompt,
    )
    settings = words.image_settings
    num_patches = 0
    for picture in pictures:
        height, width = images.fit(
            picture.height_pixels,
            picture.width_pixels,
            settings,
            picture.scale,
            name=f"image {picture.path or 'of the row'}",
        )
        num_patches += (height // settings.patch_size) * (width // settings.patch_size)
    num_tokens = len(words.token_ids(text))
    # Each picture has a single placeholder in the text.
    num_tokens += num_patches // settings.merge_size**2 - len(pictures)
    return Size(tokens=num_tokens, patches=num_patches, images=len(pictures))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnTokens:
    """The token ids before and after a response."""

    start: tuple[int, ...]  # <|im_start|>assistant; the next token is the line break
    end: int  # <|im_end|>

    @classmethod
    def of(cls, tokenizer: transformers.PreTrainedTokenizerBase) -> "TurnTokens":
        """Return a tokenizer's ids; InputError if it has no token for the end of a turn."""
        start = tokenizer.encode("<|im_start|>assistant", add_special_tokens=False)
        end = tokenizer.encode(_END, add_special_tokens=False)
        if len(end) != 1:
            raise errors.InputError(f"the tokenizer has no token {_END}, it gives {end}")
        return cls(start=tuple(start), end=end[0])

    def is_response(self, tokens: np.ndarray, turns: Sequence[records.Message]) -> np.ndarray:
        r"""Return bool[T]: the token is part of a learned response, its end token included.

            <|im_start|> assistant \n  So  7  .  <|im_end|> \n
                 0           0     0   1   1  1      1      0

        A line break at the start of a response forms a single token with the template's line break.
        A sampler's prompt never ends with that token, so it is not part of the response.

        Raises:
          InputError: some turns are not learned, and the template omits turns of the assistant.
        """
        is_learned = [turn.is_learned for turn in turns if turn.role == "assistant"]
        is_response = np.zeros(len(tokens), bool)
        starts = np.flatnonzero(tokens == self.start[0])
        for number, token in enumerate(self.start[1:], start=1):
            starts = starts[starts + number < len(tokens)]
            starts = starts[tokens[starts + number] == token]
        (ends,) = np.nonzero(tokens == self.end)
        if len(starts) != len(is_learned):
            if not all(is_learned):
                raise errors.InputError(
                    f"the chat template writes {len(starts)} turns of the assistant for "
                    f"{len(is_learned)}: it is not known which of them are learned"
                )
            is_learned = [True] * len(starts)
        for first in (starts + len(self.start) + 1)[np.array(is_learned, bool)]:
            place = np.searchsorted(ends, first)
            last = ends[place] + 1 if place < len(ends) else len(tokens)
            is_response[first:last] = True
        return is_response


def encode_prompts(
    rows: Sequence[records.PromptRow], words: processor.Processor
) -> list[inputs.Example]:
    """Return the prompts of rows as examples for the sampler."""
    return [example(row.prompt, row.images, words, add_generation_prompt=True) for row in rows]
