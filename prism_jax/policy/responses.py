"""What a policy said: sampled tokens to texts, segments and tasks for the judge.

The text of a response is what its tokens say without special tokens. A special token that a policy
writes inside a response is therefore seen by no format rule, judge or file, but it stays among the
tokens, where a discriminator meets it. A token that the tokenizer does not have becomes U+FFFD.
"""

import dataclasses
from collections.abc import Sequence

from prism_jax.data import processor, records
from prism_jax.rewards import score, tags
from prism_jax.rollout import engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """Cut responses into segments."""

    bytes_of_token: Sequence[bytes]  # of every row of the model's vocabulary
    end_tokens: tuple[int, ...]
    gate: tags.Gate

    @classmethod
    def of(
        cls, words: processor.Processor, *, vocab_tokens: int | None, gate: tags.Gate
    ) -> "Reader":
        """Make a reader; `vocab_tokens` are the rows of the model's vocabulary, None: as many as
        the tokenizer has."""
        table = tags.token_bytes(words.tokenizer, vocab_tokens=vocab_tokens)
        for index, token in words.tokenizer.added_tokens_decoder.items():
            if token.special:
                table[index] = b""
        return cls(bytes_of_token=table, end_tokens=words.ids.ends, gate=gate)

    def read(self, rollout: engine.Rollout) -> list[tags.Segments]:
        """Return the segments of every response, in order.

        Raises:
          ValueError: the sampler ended responses with other tokens than these.
        """
        found = [
            tags.segment(
                tokens[:length].tolist(),
                bytes_of_token=self.bytes_of_token,
                end_tokens=self.end_tokens,
                gate=self.gate,
            )
            for tokens, length in zip(rollout.tokens, rollout.lengths, strict=True)
        ]
        if [one.ended for one in found] != rollout.ended.tolist():
            raise ValueError("the sampler's end tokens must be those of the tokenizer's folder")
        return found


def tasks(
    rows: Sequence[records.PromptRow], segments: Sequence[tags.Segments], *, num_responses: int
) -> list[score.Task]:
    """Return what the judge is asked about responses, those to one row side by side.

    Raises:
      ValueError: a row has no ground truth.
    """
    if len(segments) != len(rows) * num_responses:
        raise ValueError(f"{len(segments)} responses to {len(rows)} rows x {num_responses}")
    missing = [row.id for row in rows if row.ground_truth is None]
    if missing:
        raise ValueError(f"rows without ground truth cannot be judged: {missing[:5]}")
    return [
        score.Task(
            response=one.text,
            ended=one.ended,
            ground_truth=rows[number // num_responses].ground_truth,
            equivalent_answers=rows[number // num_responses].equivalent_answers,
            data_source=rows[number // num_responses].data_source or "",
        )
        for number, one in enumerate(segments)
    ]
