"""The text between caption and cot, in tokens: one line break, as the tokenizer would write it.

A policy may leave the break out, double it, or write it as a separate token. That says nothing of
caption or cot, but the caption would end in another token than the teacher's, `>` instead of `>`
and break in one, and a discriminator needs no more to separate the sides.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence

from prism_jax.rewards import tags

# Its tokens show how the break is written.
EXAMPLE = "<caption>\n7\n</caption>\n<think>"
_TAG = tags.CAPTION_END.encode()
_BREAK = b"\n"


class Seam:
    """The tokens where a caption ends and a cot begins, and the rule that rewrites them alone."""

    def __init__(
        self,
        example: Sequence[int],
        bytes_of_token: Sequence[bytes],
        *,
        encode: Callable[[str], list[int]],
    ):
        """Take the tokens of `EXAMPLE`, the table of `tags.token_bytes` and the tokenizer."""
        self._bytes, self._encode = bytes_of_token, encode
        data, ends = self._bytes_of(example)
        end = data.index(_TAG) + len(_TAG)
        number = bisect.bisect_left(ends, end)
        start = ends[number - 1] if number else 0
        self._last = example[number]  # the token that completes the tag
        self._tag_end = data[start:end]  # the part of the tag in it
        behind = itertools.takewhile(lambda t: bytes_of_token[t].isspace(), example[number + 1 :])
        self._lead = list(behind)  # the break, where the last token does not hold it
        self._is_clean = data[end : ends[number + len(self._lead)]] == _BREAK

    def with_one_break(self, tokens: list[int], caption_tokens: int) -> tuple[list[int], list[int]]:
        """Return the tokens of caption and cot.

        They stay as they are where they have the break already or no tag, and for a tokenizer that
        writes the break into one token with other text.

        Args:
          tokens: a well-formed response with its end token.
          caption_tokens: as `tags.segment` counts them.
        """
        unchanged = tokens[:caption_tokens], tokens[caption_tokens:]
        data, ends = self._bytes_of(tokens)
        if not self._is_clean or _TAG not in data:
            return unchanged
        starts = [0, *ends[:-1]]
        end = data.index(_TAG) + len(_TAG)
        body = len(data) - len(data[end:].lstrip())
        lead = tokens[caption_tokens : caption_tokens + len(self._lead)]
        if data[end:body] == _BREAK and (tokens[caption_tokens - 1], lead) == (
            self._last,
            self._lead,
        ):
            return unchanged
        for first in range(caption_tokens - 1, -1, -1):
            before = _text(data[starts[first] : end].removesuffix(self._tag_end))
            if before is not None and data[starts[first] : end].endswith(self._tag_end):
                break
        else:
            return unchanged
        second = bisect.bisect_right(ends, body)
        rest = []
        if starts[second] < body:  # a token begins in the gap
            while (inside := _text(data[body : ends[second]])) is None:
                second += 1
            rest, second = self._encode(inside), second + 1
        caption = [*tokens[:first], *(self._encode(before) if before else []), self._last]
        return caption, [*self._lead, *rest, *tokens[second:]]

    def _bytes_of(self, tokens: Sequence[int]) -> tuple[bytes, list[int]]:
        pieces = [self._bytes[token] for token in tokens]
        return b"".join(pieces), list(itertools.accumulate(map(len, pieces)))


def _text(data: bytes) -> str | None:
    """Return the text of whole characters; None where one is cut."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
