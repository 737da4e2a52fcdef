"""Check a response's three segments and cut it into caption and cot, in characters and tokens.

A response is `<caption>…</caption><think>…</think><answer>…</answer>` and an end-of-turn token:

    tokens   <caption> a  dog  </caption>  \n  <think> … </answer>  <|im_end|>
             └───────── caption ───────┘  └────────────── cot ──────────────┘
    scored                          ^                                 ^

The caption is all tokens up to and including the token that completes `</caption>`; the cot is the
rest, the end token included. A discriminator scores each segment at its last token. Responses of
teacher and student are cut by the same function, so for both these are the token that completes
`</caption>` and the end token. A response that was cut by the length limit has no end token: its
format is invalid and it has no cot.

All is done in a single pass over the response: O(length).
Source: PRISM verl/verl/workers/critic/dp_critic.py:489,513 (segments), :389 (format).
"""

import bisect
import dataclasses
import itertools
import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

from prism_jax import errors

Gate = Literal["strict", "official", "geo3k"]

TAGS = ("<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>")
CAPTION_END = "</caption>"

_OFFICIAL_OPEN = re.compile(r"\s*<caption>")
_OFFICIAL_THINK = re.compile(r"</caption>\s*<think>")
_OFFICIAL_ANSWER = re.compile(r"</think>\s*<answer>")
# The text of vocabulary rows without a token: visible, and never part of a tag.
_NO_TEXT = "\ufffd".encode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segments:
    """The positions of the segments of a response.

    `tokens[:caption_tokens]` is the caption, `tokens[caption_tokens:response_tokens]` the cot;
    `text[:caption_chars]` and `text[caption_chars:]` the same in characters. The end token has no
    characters. When `format_ok` is False all three counts of segments are 0, so that no part of the
    response can be scored by accident.
    """

    text: str
    format_ok: bool
    ended: bool
    caption_chars: int
    caption_tokens: int
    cot_tokens: int
    response_tokens: int

    @property
    def caption(self) -> str:
        return self.text[: self.caption_chars]

    @property
    def cot(self) -> str:
        return self.text[self.caption_chars :] if self.format_ok else ""


def format_ok(text: str, *, gate: Gate) -> bool:
    """Return whether a response's text has the required format.

    strict: each of the six tags exactly once and in order, non-blank text in each segment, only
    white space between and around the segments (so no tag lies inside a segment). official: as
    the released regular expression: tags may repeat or nest, and segments may be empty. geo3k: the
    six tags occur in this order, as in the released validation.

    The official expression backtracks: a response of repeated tags takes it cubic time. Its three
    lazy gaps are matched here leftmost, which accepts the same texts in linear time.
    Source: PRISM verl/verl/utils/reward_score/mm_gad_no_llm.py:21; geo3k.py:25.
    """
    if gate == "strict":
        return _strict_spans(text) is not None
    if gate == "official":
        return _official_format_ok(text)
    if gate == "geo3k":
        return _in_order(text)
    raise ValueError(f"rewards.gate must be 'strict', 'official' or 'geo3k', got {gate!r}")


def _strict_spans(text: str) -> dict[str, tuple[int, int]] | None:
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    at = [text.find(tag) for tag in TAGS]
    after = [start + len(tag) for start, tag in zip(at, TAGS, strict=True)]
    if any(end > start for end, start in zip(after, at[1:], strict=False)):
        return None
    outside = text[: at[0]], text[after[1] : at[2]], text[after[3] : at[4]], text[after[5] :]
    inside = {name: (after[i], at[i + 1]) for name, i in (("caption", 0), ("think", 2))}
    inside["answer"] = (after[4], at[5])
    if any(part.strip() for part in outside):
        return None
    if not all(text[start:end].strip() for start, end in inside.values()):
        return None
    return inside


def _official_format_ok(text: str) -> bool:
    start = _OFFICIAL_OPEN.match(text)
    think = start and _OFFICIAL_THINK.search(text, start.end())
    answer = think and _OFFICIAL_ANSWER.search(text, think.end())
    if not answer:
        return False
    body = text.rstrip()
    return body.endswith("</answer>") and len(body) - len("</answer>") >= answer.end()


def _in_order(text: str) -> bool:
    position = 0
    for tag in TAGS:
        position = text.find(tag, position)
        if position < 0:
            return False
        position += len(tag)
    return True


def answer_text(text: str) -> str:
    """Return the stripped text of the first `<answer>…</answer>`, "" if there is none.

    The strict gate allows only a single pair. The released code also takes the first pair, even if
    it lies inside `<think>`.
    Source: PRISM verl/verl/utils/reward_score/mm_gad_no_llm.py:69.
    """
    start = text.find("<answer>")
    if start < 0:
        return ""
    start += len("<answer>")
    end = text.find("</answer>", start)
    return text[start:end].strip() if end >= 0 else ""


def split_text(text: str) -> tuple[str, str]:
    """Cut a text after its first `</caption>` into caption and cot; ("", "") if there is none."""
    at = text.find(CAPTION_END)
    if at < 0:
        return "", ""
    return text[: at + len(CAPTION_END)], text[at + len(CAPTION_END) :]


def segment(
    tokens: Sequence[int],
    *,
    bytes_of_token: Sequence[bytes],
    end_tokens: Collection[int],
    gate: Gate,
) -> Segments:
    """Cut a response into caption and cot.

    Tokens after the first end token are padding and are ignored. Tags may straddle tokens and a
    character may be spread over several: the search runs on bytes, and the byte offset is turned
    into a token index by bisection over the running lengths. A token that completes `</caption>`
    and continues (`"><"`) belongs wholly to the caption.

    Args:
        tokens: the response without its prompt, as plain integers.
        bytes_of_token: the table of `token_bytes`.
        end_tokens: ids that end a turn.
        gate: the format rule; see `format_ok`. Under any rule, a response without an end token has
            an invalid format.
    """
    length = next((i for i, token in enumerate(tokens) if token in end_tokens), len(tokens))
    ended = length < len(tokens)
    pieces = [bytes_of_token[token] for token in tokens[:length]]
    data = b"".join(pieces)
    text = data.decode("utf-8", errors="replace")
    response_tokens = length + ended
    ok = ended and format_ok(text, gate=gate)
    caption_chars = caption_tokens = cot_tokens = 0
    if ok:
        tag = CAPTION_END.encode()
        ends = list(itertools.accumulate(map(len, pieces)))
        caption_tokens = bisect.bisect_left(ends, data.index(tag) + len(tag)) + 1
        cot_tokens = response_tokens - caption_tokens
        caption_chars = text.index(CAPTION_END) + len(CAPTION_END)
    return Segments(
        text=text,
        format_ok=ok,
        ended=ended,
        caption_chars=caption_chars,
        caption_tokens=caption_tokens,
        cot_tokens=cot_tokens,
        response_tokens=response_tokens,
    )


def byte_of_symbol() -> dict[str, int]:
    """Map each of the 256 printable symbols of a byte-level BPE vocabulary to its byte.

    The bytes that print in Latin-1 stand for themselves; the others take the code points from 256
    on, in order, so that no symbol is a control character or a space.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printing)]
    table = {chr(byte): byte for byte in printing}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(tokenizer: Any, *, vocab_tokens: int | None) -> list[bytes]:
    """Return the bytes of each token of a byte-level BPE tokenizer.

    Args:
        tokenizer: a `transformers` fast tokenizer.
        vocab_tokens: rows of the model's vocabulary, which may be padded beyond the tokenizer's.
            Rows without a token get U+FFFD, which is visible if sampled. None: no padding.

    Raises:
        InputError: the vocabulary is not byte-level, or has more tokens than the model has rows.
    """
    vocabulary = tokenizer.get_vocab()
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    num_tokens = max(vocabulary.values()) + 1
    rows = num_tokens if vocab_tokens is None else vocab_tokens
    if rows < num_tokens:
        raise errors.InputError(f"tokenizer has {num_tokens} tokens, the model's table {rows} rows")
    symbols = byte_of_symbol()
    table = [_NO_TEXT] * rows
    for token, index in vocabulary.items():
        if token in added:
            table[index] = token.encode()
            continue
        try:
            table[index] = bytes(symbols[symbol] for symbol in token)
        except KeyError as error:
            raise errors.InputError(
                f"tokenizer must be a byte-level BPE: token {index} is {token!r}"
            ) from error
    return table
