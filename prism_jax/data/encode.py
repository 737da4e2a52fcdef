"""Rows as the model reads them: marks become pictures, and responses are found in the tokens."""

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
    """Count what a sequence takes of its row."""

    tokens: int
    patches: int
    images: int


def messages(turns: Sequence[records.Message]) -> list[chat.Message]:
    """Return chat messages, each mark of a picture as a part where it stands in the text."""
    found = []
    for turn in turns:
        content: str | list[dict[str, str]] = turn.content
        if records.IMAGE_MARK in turn.content:
            content = []
            for number, text in enumerate(turn.content.split(records.IMAGE_MARK)):
                content += [{"type": "image"}] if number else []
                content += [{"type": "text", "text": text}] if text else []
        found.append({"role": turn.role, "content": content})
    return found


def example(
    turns: Sequence[records.Message],
    pictures: Sequence[records.Image],
    words: processor.Processor,
    *,
    add_generation_prompt: bool,
) -> inputs.Example:
    """Encode the turns of a validated row.

    Raises:
      InputError: for everything that `Processor.encode` and `images.open_image` refuse.
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
    """Count what `example` of the same arguments will take, without decoding a picture."""
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
    # Each picture has one placeholder in the text.
    num_tokens += num_patches // settings.merge_size**2 - len(pictures)
    return Size(tokens=num_tokens, patches=num_patches, images=len(pictures))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnTokens:
    """Hold the ids between which a response stands."""

    start: tuple[int, ...]  # <|im_start|>assistant; the next token is the line break
    end: int  # <|im_end|>

    @classmethod
    def of(cls, tokenizer: transformers.PreTrainedTokenizerBase) -> "TurnTokens":
        """Ask a tokenizer; InputError when it has no token for the end of a turn."""
        start = tokenizer.encode("<|im_start|>assistant", add_special_tokens=False)
        end = tokenizer.encode(_END, add_special_tokens=False)
        if len(end) != 1:
            raise errors.InputError(f"the tokenizer has no token {_END}, it gives {end}")
        return cls(start=tuple(start), end=end[0])

    def is_response(self, tokens: np.ndarray, turns: Sequence[records.Message]) -> np.ndarray:
        r"""Return bool[T]: the token is part of a response to learn, or the end of one.

            <|im_start|> assistant \n  So  7  .  <|im_end|> \n
                 0           0     0   1   1  1      1      0

        A line break that the response begins with is one token with the template's, which the
        prompt of a sampler never holds: it is no response either.

        Raises:
          InputError: some turns are not learned, and the template does not write every turn of the
            assistant.
        """
        is_learned = [turn.is_learned for turn in turns if turn.role == "assistant"]
        found = np.zeros(len(tokens), bool)
        starts = np.flatnonzero(tokens == self.start[0])
        for number, wanted in enumerate(self.start[1:], start=1):
            starts = starts[starts + number < len(tokens)]
            starts = starts[tokens[starts + number] == wanted]
        (ends,) = np.nonzero(tokens == self.end)
        if len(starts) != len(is_learned):
            if not all(is_learned):
                raise errors.InputError(
                    f"the chat template writes {len(starts)} turns of the assistant for "
                    f"{len(is_learned)}: it cannot be told which of them are learned"
                )
            is_learned = [True] * len(starts)
        for first in (starts + len(self.start) + 1)[np.array(is_learned, bool)]:
            place = np.searchsorted(ends, first)
            last = ends[place] + 1 if place < len(ends) else len(tokens)
            found[first:last] = True
        return found


def encode_prompts(
    rows: Sequence[records.PromptRow], words: processor.Processor
) -> list[inputs.Example]:
    """Return the prompts of rows as the sampler reads them."""
    return [example(row.prompt, row.images, words, add_generation_prompt=True) for row in rows]
