"""The responses of a policy: from sampled tokens to texts, segments and rewards.

The text of a response is that of its tokens without special tokens. A special token that a policy
writes inside a response is therefore seen by no format rule, judge or file, but it stays among the
tokens, where a discriminator meets it. A token that the tokenizer does not have becomes U+FFFD.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol

from prism_jax import metrics
from prism_jax.data import processor, records
from prism_jax.rewards import score, tags
from prism_jax.rollout import engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """The rule that cuts responses into segments."""

    bytes_of_token: Sequence[bytes]  # of every row of the model's vocabulary
    end_tokens: tuple[int, ...]
    gate: tags.Gate

    @classmethod
    def of(
        cls, words: processor.Processor, *, vocab_tokens: int | None, gate: tags.Gate
    ) -> "Reader":
        """Make a reader.

        Args:
          vocab_tokens: rows of the model's vocabulary; None: those of the tokenizer.
        """
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
        segments = [
            tags.segment(
                tokens[:length].tolist(),
                bytes_of_token=self.bytes_of_token,
                end_tokens=self.end_tokens,
                gate=self.gate,
            )
            for tokens, length in zip(rollout.tokens, rollout.lengths, strict=True)
        ]
        if [response.ended for response in segments] != rollout.ended.tolist():
            raise ValueError("the sampler's end tokens must be those of the tokenizer's folder")
        return segments


def tasks(
    rows: Sequence[records.PromptRow], segments: Sequence[tags.Segments], *, num_responses: int
) -> list[score.Task]:
    """Return the judge's tasks for responses, those to one row side by side."""
    if len(segments) != len(rows) * num_responses:
        raise ValueError(f"{len(segments)} responses to {len(rows)} rows x {num_responses}")
    values = [_values(row) for row in rows]
    return [
        score.Task(
            response=response.text,
            ended=response.ended,
            ground_truth=rows[number // num_responses].ground_truth,
            equivalent_answers=rows[number // num_responses].equivalent_answers,
            data_source=rows[number // num_responses].data_source or "",
            row=values[number // num_responses],
        )
        for number, response in enumerate(segments)
    ]


def _values(row: records.PromptRow) -> dict[str, Any]:
    """Return the fields of a row that `rewards.custom` gives to a function of the user's."""
    return {
        "id": row.id,
        "prompt": [{"role": turn.role, "content": turn.content} for turn in row.prompt],
        "images": [
            {
                "sha256": image.sha256,
                "width_pixels": image.width_pixels,
                "height_pixels": image.height_pixels,
            }
            for image in row.images
        ],
        "videos": [
            {
                "sha256": [file.sha256 for file in video.files],
                "num_frames": video.num_frames,
                "frames_per_second": video.frames_per_second,
            }
            for video in row.videos
        ],
        "extra_info": dict(row.extra_info),
    }


class Judge(Protocol):
    """The checker of answers, see `rewards.workers.JudgePool` and `rewards.custom`."""

    def grade(self, tasks: Sequence[score.Task]) -> list[score.Reward]:
        """Return the reward of each response, in order."""


def judge(
    judge: Judge, rows: Sequence[records.PromptRow], segments: Sequence[tags.Segments]
) -> tuple[list[score.Reward], metrics.Metrics]:
    """Return the reward of each response, those to one row side by side, and the time it took.

    One call judges all responses of a generation, so that its processes are never idle between
    prompts.
    """
    begun = time.monotonic()
    rewards = judge.grade(tasks(rows, segments, num_responses=len(segments) // len(rows)))
    return rewards, {"time/judge_seconds": metrics.mean([time.monotonic() - begun])}
