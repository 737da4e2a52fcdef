"""Alignments whose responses come from a script: a new policy writes no tags."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest
import tokenizers

from prism_jax.rollout import engine

TEXTS = (
    "<caption>a one</caption>\n<think>1</think>\n<answer>1</answer>",
    "<caption>\nthe digits are there\n</caption><think>so it is 2</think><answer>2</answer>",
    "<caption>x</caption>\n<think>The digits of the row.</think>\n<answer>12</answer>",
    "<caption>no end",
)


@contextlib.contextmanager
def scripted(
    tokenizer: pathlib.Path, texts: tuple[str, ...] = TEXTS, *, good_steps: int | None = None
) -> Iterator[None]:
    """Let every policy answer one of the texts by chance; the last of them is cut.

    After `good_steps` steps all answers are the last one; None: never.
    """
    num_calls = 0
    words = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end = words.token_to_id("<|im_end|>")

    def generate(
        self, params, prompts, sampling, key, *, num_responses, first_prompt=0, on_chunk=None
    ):
        nonlocal num_calls
        num_calls += 1
        del self, params, first_prompt, on_chunk
        size = len(prompts) * num_responses
        chosen = np.asarray(jax.random.randint(key, (size,), 0, len(texts)))
        if good_steps is not None and num_calls > good_steps:
            chosen = np.full(size, len(texts) - 1)
        rollout = engine.Rollout(
            tokens=np.zeros((size, sampling.max_tokens), np.int32),
            logprobs=np.zeros((size, sampling.max_tokens), np.float32),
            lengths=np.zeros(size, np.int32),
            ended=chosen != len(texts) - 1,
        )
        for row, text in enumerate(chosen):
            ids = words.encode(texts[text]).ids + [end] * bool(rollout.ended[row])
            rollout.tokens[row, : len(ids)] = ids
            rollout.lengths[row] = len(ids)
        return rollout

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Engine, "generate", generate)
        yield
