"""What the discriminator reads: prompts, and the segments of teacher's and student's responses.

A response is tokenised whole, with its end token, and cut by `rewards.tags.segment`, the one rule
for texts from files and for tokens from the sampler. So both sides have the same boundaries and are
scored at the same kind of token.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from models.inputs import Example
from prism_jax.continuations import Continuation
from prism_jax.data import encode, processor, prompts, records
from prism_jax.rewards import tags
from prism_jax.stages import responses

NAMES = ("caption", "cot")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Hold the tokens of one response, int32[n], and where its caption ends."""

    tokens: np.ndarray
    caption_tokens: int

    def segment(self, name: str) -> np.ndarray:
        """Return the tokens of "caption" or "cot"."""
        if name == "caption":
            return self.tokens[: self.caption_tokens]
        return self.tokens[self.caption_tokens :]

    @property
    def longest(self) -> int:
        """Return the tokens of the longer segment."""
        return max(self.caption_tokens, len(self.tokens) - self.caption_tokens)


def join(caption: str, cot: str) -> str:
    """Return the response of two segments; a line break goes between them where nothing stands.

    A policy writes the break that its demonstrations have; without one here the discriminator
    could tell the sides apart by it.
    """
    is_apart = caption[-1:].isspace() or cot[:1].isspace()
    return caption + cot if is_apart else f"{caption}\n{cot}"


class Reader:
    """Cut texts for one discriminator."""

    def __init__(self, words: processor.Processor, *, vocab_tokens: int, gate: tags.Gate):
        self._words = words
        self._reader = responses.Reader.of(words, vocab_tokens=vocab_tokens, gate=gate)
        self._end = encode.TurnTokens.of(words.tokenizer).end

    def cut(self, text: str) -> Cut:
        """Return the tokens of a response and its segments.

        Raises:
          RowError: its format is not the one that the gate asks for.
        """
        tokens = [*self._words.tokenizer(text, add_special_tokens=False)["input_ids"], self._end]
        found = tags.segment(
            tokens,
            bytes_of_token=self._reader.bytes_of_token,
            end_tokens=self._reader.end_tokens,
            gate=self._reader.gate,
        )
        if not found.format_ok:
            raise records.RowError(
                "format", f"a response is not of the {self._reader.gate} format: {text[:200]!r}"
            )
        return Cut(tokens=np.array(tokens, np.int32), caption_tokens=found.caption_tokens)

    def prompt(
        self,
        turns: Sequence[records.Message],
        pictures: Sequence[records.Image],
        *,
        sees_images: bool,
    ) -> Example:
        """Return a prompt; a text-only discriminator reads it without pictures and their marks."""
        turns, pictures = seen(turns, pictures, sees_images=sees_images)
        return encode.example(turns, pictures, self._words, add_generation_prompt=True)

    def measure(
        self,
        turns: Sequence[records.Message],
        pictures: Sequence[records.Image],
        *,
        sees_images: bool,
    ) -> encode.Size:
        """Return the size of `prompt`, without decoding a picture."""
        turns, pictures = seen(turns, pictures, sees_images=sees_images)
        return encode.measure(turns, pictures, self._words, add_generation_prompt=True)


def seen(
    turns: Sequence[records.Message],
    pictures: Sequence[records.Image],
    *,
    sees_images: bool,
) -> tuple[Sequence[records.Message], Sequence[records.Image]]:
    """Return what a discriminator sees of a prompt."""
    if sees_images:
        return turns, pictures
    bare = [
        dataclasses.replace(turn, content=turn.content.replace(records.IMAGE_MARK, ""))
        for turn in turns
    ]
    return bare, ()


def turns_of_pair(row: records.PairRow) -> list[records.Message]:
    """Return a pair's prompt: the system turn of every stage, and the user's text.

    Source: PRISM moe/train_moe_vl_warmup_fast.py:195-199.
    """
    return [
        records.Message(role="system", content=prompts.SYSTEM_PROMPT),
        records.Message(role="user", content=row.prompt),
    ]


def teacher_text(row: records.PromptRow) -> str:
    """Return the teacher's response to a prompt."""
    return join(row.teacher_caption, row.teacher_cot)


def texts_of_pair(row: records.PairRow) -> tuple[str, str]:
    """Return the teacher's and the student's response of a pair, whichever form the row has."""
    if row.teacher_response is not None:
        return row.teacher_response, row.student_response
    return join(row.teacher_caption, row.teacher_cot), join(row.student_caption, row.student_cot)


def continuation(prompt: int, cut: Cut, name: str) -> Continuation:
    """Return a segment behind the prompt of this number."""
    return Continuation(prompt=prompt, tokens=cut.segment(name))


def same_words(one: processor.Processor, other: processor.Processor) -> bool:
    """Tell whether two models read tokens as the same text."""
    return one.tokenizer.get_vocab() == other.tokenizer.get_vocab() and one.ids == other.ids
