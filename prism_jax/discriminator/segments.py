"""The input of the discriminator: prompts, and segments of teacher's and student's responses.

A response is tokenised whole, with its end token, and cut by `rewards.tags.segment`, the one rule
for texts from files and for tokens from the sampler. So both sides have the same boundaries and are
scored at the same kind of token. A view chooses the segments:

    view          segments
    caption_cot   caption, cot              the method
    whole         response                  GAD: nothing is cut
    both          caption, cot, response

The released stages end segments in two other ways. `Form.scored_token` names all three:

    last      tokens as they lie in the response, one line break between caption and cot however it
              was written (`seams`); a caption is scored where `</caption>` completes, a cot and a
              response at <|im_end|>
    newline   the text of a segment by itself, then <|im_end|> and the template's line break, which
              is scored on both sides
    pad       a teacher's text by itself, then <|endoftext|>, which is scored; a student's segment
              as in `last`

Source: PRISM verl/verl/workers/critic/dp_critic.py:489,513; moe/train_moe_vl_warmup_fast.py:224-237
(newline); verl/verl/utils/dataset/rl_dataset.py:393-430 and vllm_rollout_spmd.py:474,504,526 (pad,
512 tokens).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from models import kinds
from models.inputs import Example
from prism_jax.data import encode, processor, prompts, records
from prism_jax.discriminator import seams
from prism_jax.policy import responses
from prism_jax.rewards import tags
from prism_jax.rows import Continuation

View = Literal["caption_cot", "whole", "both"]
ScoredToken = Literal["last", "newline", "pad"]

VIEWS: Mapping[View, tuple[str, ...]] = {
    "caption_cot": ("caption", "cot"),
    "whole": ("response",),
    "both": ("caption", "cot", "response"),
}
# The model's name for each.
KINDS = {"caption": kinds.CAPTION, "cot": kinds.COT, "response": kinds.WHOLE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A response and its two parts, as a file has them or as they are cut from the whole."""

    response: str
    caption: str
    cot: str

    @classmethod
    def of_parts(cls, caption: str, cot: str) -> "Text":
        """Return the response of two parts."""
        return cls(response=join(caption, cot), caption=caption, cot=cot)

    @classmethod
    def of_whole(cls, response: str) -> "Text":
        """Return the two parts of a response, cut behind its caption."""
        caption, cot = tags.split_text(response)
        return cls(response=response, caption=caption, cot=cot)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """The segments of one response; each is scored at its last token."""

    tokens: Mapping[str, np.ndarray]  # int32[n] by segment
    shortened: tuple[str, ...]  # segments that a limit has cut

    @property
    def longest(self) -> int:
        """Return the tokens of the longest segment."""
        return max(map(len, self.tokens.values()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """The choice of segments, and how they end."""

    view: View
    scored_token: ScoredToken
    teacher_max_tokens: int | None  # of a segment; the rest is not read

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the segments."""
        return VIEWS[self.view]

    @property
    def kinds(self) -> tuple[int, ...]:
        """Return the model's names for them."""
        return tuple(KINDS[name] for name in self.names)


def problems_of_length(
    place: str, length_beta: Sequence[tuple[str, float]], view: View
) -> list[str]:
    """Return the problems of the coefficients of the lengths of segments."""
    names = [name for name, _ in length_beta]
    if set(names) <= set(VIEWS[view]) and len(set(names)) == len(names):
        return []
    return [f"{place} must name each of {', '.join(VIEWS[view])} at most once, got {names}"]


def join(caption: str, cot: str) -> str:
    """Return the response of two segments, with a line break between them.

    A policy writes the break that its demonstrations have; without one here the discriminator
    could separate the sides by it.
    """
    is_apart = caption[-1:].isspace() or cot[:1].isspace()
    return caption + cot if is_apart else f"{caption}\n{cot}"


class Reader:
    """The rule that cuts texts for one discriminator."""

    def __init__(
        self, words: processor.Processor, *, vocab_tokens: int | None, gate: tags.Gate, form: Form
    ):
        self._words, self._form = words, form
        self._reader = responses.Reader.of(words, vocab_tokens=vocab_tokens, gate=gate)
        self._end = encode.TurnTokens.of(words.tokenizer).end
        self._break = words.tokenizer.encode("\n", add_special_tokens=False)
        self._seam = seams.Seam(
            self._tokens(seams.EXAMPLE), self._reader.bytes_of_token, encode=self._tokens
        )

    @property
    def tail_tokens(self) -> int:
        """Return the most tokens that a segment may have more than its response."""
        return 1 + len(self._break) if self._form.scored_token == "newline" else 0

    def teacher(self, text: Text) -> Cut:
        """Return the segments of a teacher's response.

        Raises:
          RowError: its format is not the one that the gate asks for.
        """
        form = self._form
        if form.scored_token == "last":
            return self._of_text(text, form.teacher_max_tokens)
        self._cut(text)  # for its format alone
        bodies = {name: self._tokens(dataclasses.asdict(text)[name]) for name in form.names}
        limit = form.teacher_max_tokens
        longer = [name for name, body in bodies.items() if limit is not None and len(body) > limit]
        is_padded = form.scored_token == "pad"
        tail = [self._words.ids.pad] if is_padded else [self._end, *self._break]
        tokens = {
            # The released teacher is padded to its limit: a text that reaches it has no padding.
            name: body[:limit] + ([] if is_padded and limit == len(body[:limit]) else tail)
            for name, body in bodies.items()
        }
        return _cut_of(tokens, tuple(longer))

    def student(self, text: Text) -> Cut:
        """Return the segments of a student's response that is a text; see `teacher`."""
        form = self._form
        if form.scored_token != "newline":
            return self._of_text(text, None)
        self._cut(text)
        tail = [self._end, *self._break]
        parts = dataclasses.asdict(text)
        return _cut_of({name: self._tokens(parts[name]) + tail for name in form.names}, ())

    def cut(self, tokens: np.ndarray, segments: tags.Segments) -> Cut:
        """Return the segments of a well-formed response of the sampler, see `Form`."""
        parts = self._slices(tokens.tolist(), segments.caption_tokens)
        if self._form.scored_token == "newline":
            parts["caption"] = [*parts["caption"], self._end]
            parts = {name: [*part, *self._break] for name, part in parts.items()}
        return _cut_of({name: parts[name] for name in self._form.names}, ())

    def prompt(
        self,
        turns: Sequence[records.Message],
        media: encode.Media,
        *,
        sees_images: bool,
    ) -> Example:
        """Return a prompt; a text-only discriminator reads it without pictures and their marks."""
        turns, media = seen(turns, media, sees_images=sees_images)
        return encode.example(turns, media, self._words, add_generation_prompt=True)

    def measure(
        self,
        turns: Sequence[records.Message],
        media: encode.Media,
        *,
        sees_images: bool,
    ) -> encode.Size:
        """Return the size of `prompt`, without decoding a picture."""
        turns, media = seen(turns, media, sees_images=sees_images)
        return encode.measure(turns, media, self._words, add_generation_prompt=True)

    def _of_text(self, text: Text, limit: int | None) -> Cut:
        tokens, segments = self._cut(text)
        parts = self._slices(tokens, segments.caption_tokens)
        shortened = [n for n in self._form.names if limit is not None and len(parts[n]) > limit]
        return _cut_of({name: parts[name][:limit] for name in self._form.names}, tuple(shortened))

    def _cut(self, text: Text) -> tuple[list[int], tags.Segments]:
        """Return the tokens of the whole response, its end token included, and its segments."""
        tokens = [*self._tokens(text.response), self._end]
        segments = tags.segment(
            tokens,
            bytes_of_token=self._reader.bytes_of_token,
            end_tokens=self._reader.end_tokens,
            gate=self._reader.gate,
        )
        if not segments.format_ok:
            raise records.RowError(
                "format",
                f"a response is not of the {self._reader.gate} format: {text.response[:200]!r}",
            )
        return tokens, segments

    def _slices(self, tokens: list[int], caption_tokens: int) -> dict[str, list[int]]:
        """Return every segment of a response."""
        caption, cot = tokens[:caption_tokens], tokens[caption_tokens:]
        if self._form.scored_token == "last":
            caption, cot = self._seam.with_one_break(tokens, caption_tokens)
        return {"caption": caption, "cot": cot, "response": tokens}

    def _tokens(self, text: str) -> list[int]:
        return self._words.token_ids(text, add_special_tokens=False)


def _cut_of(tokens: Mapping[str, Sequence[int]], shortened: tuple[str, ...]) -> Cut:
    arrays = {name: np.array(part, np.int32) for name, part in tokens.items()}
    return Cut(tokens=arrays, shortened=shortened)


def seen(
    turns: Sequence[records.Message],
    media: encode.Media,
    *,
    sees_images: bool,
) -> tuple[Sequence[records.Message], encode.Media]:
    """Return the turns, pictures and videos of a prompt that a discriminator sees."""
    if sees_images:
        return turns, media
    bare = [
        dataclasses.replace(turn, content=records.without_marks(turn.content)) for turn in turns
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


def teacher_text(row: records.PromptRow) -> Text:
    """Return the teacher's response to a prompt."""
    return Text.of_parts(row.teacher_caption, row.teacher_cot)


def texts_of_pair(row: records.PairRow) -> tuple[Text, Text]:
    """Return the teacher's and the student's response of a pair, whichever form the row has."""
    if row.teacher_response is not None:
        return Text.of_whole(row.teacher_response), Text.of_whole(row.student_response)
    return (
        Text.of_parts(row.teacher_caption, row.teacher_cot),
        Text.of_parts(row.student_caption, row.student_cot),
    )


def continuation(prompt: int, cut: Cut, name: str) -> Continuation:
    """Return a segment behind the prompt of this number."""
    return Continuation(prompt=prompt, tokens=cut.tokens[name])


def same_words(first: processor.Processor, second: processor.Processor) -> bool:
    """Return whether two models read tokens as the same text."""
    vocabularies = [words.tokenizer.get_vocab() for words in (first, second)]
    return vocabularies[0] == vocabularies[1] and first.ids == second.ids
