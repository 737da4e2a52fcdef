"""The text of a response while its tokens come.

Token by token it is the text that `Processor.decode` gives for all of them. What may still become
a stop text, or half of a character, is held back until the next tokens decide.

    tokens      so  |  the  |  an  |  sw  |  er
    stop "answer"      held back: "a…" could begin it
    text        so  |  the  |       (nothing more: the response stops before "answer")
"""

import codecs
import collections
import dataclasses
from collections.abc import Sequence

from prism_jax.data import processor
from prism_jax.rewards import tags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The text of each token."""

    written: Sequence[bytes]  # b"" for special tokens, and for ids without a token
    names: Sequence[bytes]  # special tokens as they are spelt

    @classmethod
    def of(cls, words: processor.Processor) -> "Vocabulary":
        """Return the table of a tokenizer; InputError if its vocabulary is not byte-level."""
        names = tags.token_bytes(words.tokenizer, vocab_tokens=None)
        ids = set(words.tokenizer.get_vocab().values())
        special = {
            index for index, token in words.tokenizer.added_tokens_decoder.items() if token.special
        }
        written = [
            b"" if index in special or index not in ids else name
            for index, name in enumerate(names)
        ]
        return cls(written=written, names=names)

    def longest_bytes(self) -> int:
        """Return the most bytes of a token."""
        return max(map(len, self.names))

    def text(self, token: int) -> bytes:
        """Return what a token adds to a text."""
        return self.written[token] if token < len(self.written) else b""

    def name(self, token: int) -> str:
        """Return a token for a person who reads it."""
        shown = self.names[token] if token < len(self.names) else b""
        return shown.decode("utf-8", errors="replace")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """A token of a response, and where its text begins."""

    token: int
    logprob: float
    start: int  # characters of the response before it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """The next part of a response's text, and the tokens that wrote it."""

    text: str
    drawn: tuple[Drawn, ...]

    def __add__(self, other: "Piece") -> "Piece":
        """Return both as one."""
        return Piece(text=self.text + other.text, drawn=self.drawn + other.drawn)


class Writer:
    """The text of one response.

    Args:
      with_tokens: pieces have the tokens that wrote them.
    """

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str], *, with_tokens: bool):
        self._vocabulary, self._stops = vocabulary, tuple(stops)
        self._with_tokens = with_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held, self._given = "", 0  # text that is held back; characters handed out
        self._waiting: collections.deque[Drawn] = collections.deque()
        self.num_tokens = 0  # drawn so far, the end token included
        self.is_stopped = False  # by a stop text

    def add(self, tokens: Sequence[int], logprobs: Sequence[float]) -> Piece:
        """Return what is certain after more tokens; those behind a stop text are not read."""
        if not self._stops and not self._with_tokens:
            # Nothing depends on where a token ends.
            self.num_tokens += len(tokens)
            written = b"".join(map(self._vocabulary.text, tokens))
            return Piece(text=self._decoder.decode(written), drawn=())
        given = []
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.is_stopped:
                break
            self.num_tokens += 1
            if self._with_tokens:
                start = self._given + len(self._held)
                self._waiting.append(Drawn(token=token, logprob=logprob, start=start))
            self._held += self._decoder.decode(self._vocabulary.text(token))
            given.append(self._release())
        return self._piece("".join(given))

    def end(self, *, by_token: bool) -> Piece:
        """Return the rest.

        Args:
          by_token: the last token ended the response; it writes nothing and is not handed out.
        """
        if by_token and self._waiting:
            self._waiting.pop()
        if self.is_stopped:
            return Piece(text="", drawn=())
        self._held += self._decoder.decode(b"", final=True)
        text = self._release()
        if self.is_stopped:
            return self._piece(text)
        text, self._held = text + self._held, ""
        self._given += len(text)
        rest = tuple(self._waiting)
        self._waiting.clear()
        return Piece(text=text, drawn=rest)

    def _release(self) -> str:
        """Take the certain text from what is held back."""
        cut = self._stop()
        if cut is not None:
            self.is_stopped = True
        else:
            cut = len(self._held) - self._longest_beginning()
        text, self._held = self._held[:cut], self._held[cut:]
        self._given += len(text)
        return text

    def _stop(self) -> int | None:
        """Return where the first stop text begins."""
        places = [self._held.find(stop) for stop in self._stops]
        return min((place for place in places if place >= 0), default=None)

    def _longest_beginning(self) -> int:
        """Return the characters at the end that may be the beginning of a stop text."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _piece(self, text: str) -> Piece:
        """Return the text with the tokens that begin in what was handed out."""
        drawn = []
        while self._waiting and self._waiting[0].start < self._given:
            drawn.append(self._waiting.popleft())
        return Piece(text=text, drawn=tuple(drawn))
