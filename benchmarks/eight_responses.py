"""Forced responses in a job of `benchmarks.eight_gpus`, and the times of what learns from them.

A policy of random weights neither ends a response nor writes a tag. So each response is given a
limit, log-normal over the responses of a call, and its tokens are written over: the tags of the
format, words of the corpus chosen by the sampled tokens, a digit as the answer, the end of the
turn. All later work, the discriminator's included, is then that of a policy that keeps the format;
only the ratios between the sampler's and the trainer's log-probs mean nothing.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import transformers

from benchmarks import rollout_cases
from prism_jax.rollout import engine
from prism_jax.rollout.session import Look
from prism_jax.stages.align import updates as align_updates

Notes = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """The tokens of a response that keeps the format."""

    opening: tuple[int, ...]
    between: tuple[int, ...]  # caption and reasoning
    answer: tuple[int, ...]
    closing: tuple[int, ...]  # with the end of the turn
    words: tuple[int, ...]
    digits: tuple[int, ...]

    @classmethod
    def of(cls, folder: str) -> "Form":
        """Return the form in the tokens of a folder's tokenizer."""
        words = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

        def ids(text: str) -> tuple[int, ...]:
            return tuple(words.encode(text, add_special_tokens=False))

        return cls(
            opening=ids("<caption>\n"),
            between=ids("\n</caption>\n<think>\n"),
            answer=ids("\n</think>\n<answer>\n"),
            closing=(*ids("\n</answer>"), words.convert_tokens_to_ids("<|im_end|>")),
            words=tuple(sorted(set(ids(" the largest digit of row and column is even")))),
            digits=tuple(ids(str(digit))[0] for digit in range(10)),
        )

    @property
    def least_tokens(self) -> int:
        """Return the tokens of the shortest response, of one word a segment and the answer."""
        return len(self.opening) + len(self.between) + len(self.answer) + len(self.closing) + 3

    def write(self, sampled: np.ndarray) -> np.ndarray:
        """Return a response of as many tokens, whose words the sampled tokens choose.

        A fifth of the words are the caption's.
        """
        num_words = len(sampled) - self.least_tokens + 2
        num_caption = max(1, num_words // 5)
        chosen = np.asarray(self.words)[sampled[:num_words] % len(self.words)]
        digit = self.digits[int(sampled[num_words]) % len(self.digits)]
        pieces = (self.opening, chosen[:num_caption], self.between, chosen[num_caption:])
        return np.concatenate([*pieces, self.answer, [digit], self.closing]).astype(np.int32)


def limits(count: int, *, mean_tokens: int, least_tokens: int, max_tokens: int) -> np.ndarray:
    """Return the log-normal lengths of `rollout_cases`, none too short for the format."""
    lengths = rollout_cases.lengths(count, mean=mean_tokens, most=max_tokens)
    return np.maximum(lengths, least_tokens)


def install(folder: str, *, mean_tokens: int, notes: Notes) -> None:
    """Force the responses of this process, and time its rollouts and the updates of alignment.

    Args:
      folder: of the tokenizer.
      mean_tokens: of a response, before the limits.
      notes: gets "rollouts" and, of alignment, "model_update_seconds".
    """
    rollouts: list[Notes] = []
    seconds: dict[str, list[float]] = {"policy": [], "discriminator": []}
    notes |= {"rollouts": rollouts, "model_update_seconds": seconds}
    engine.Engine.generate = forced(engine.Engine.generate, Form.of(folder), mean_tokens, rollouts)
    align_updates.open_updates = _with_times(align_updates.open_updates, seconds)


def copy_rate() -> float:
    """Return the copy bandwidth of a device in bytes a second."""
    return rollout_cases.copy_rate(0.02 if jax.default_backend() == "cpu" else 1.0)


def forced(
    generate: Callable[..., engine.Rollout], form: Form, mean_tokens: int, notes: list[Notes]
) -> Callable[..., engine.Rollout]:
    """Return `Engine.generate` with forced lengths and forms; each call is noted.

    Raises:
      ValueError: responses of `max_tokens` are too short for the format.
    """

    def generate_forced(self, params, prompts, sampling, key, *, num_responses, **options):
        if sampling.max_tokens < form.least_tokens:
            raise ValueError(
                f"responses must have at least {form.least_tokens} tokens to keep the format, "
                f"got {sampling.max_tokens}"
            )
        lengths = limits(
            len(prompts) * num_responses,
            mean_tokens=mean_tokens,
            least_tokens=form.least_tokens,
            max_tokens=sampling.max_tokens,
        )
        looks: list[Look] = []
        begun = time.monotonic()
        # Without end tokens a response ends at its limit alone.
        endless = dataclasses.replace(sampling, end_token_ids=())
        rollout = generate(
            self,
            params,
            prompts,
            endless,
            key,
            num_responses=num_responses,
            limits=lengths.tolist(),
            on_chunk=looks.append,
            **options,
        )
        seconds = time.monotonic() - begun
        sampler = rollout_cases.Sampler(engine=self, params=params)
        notes.append(
            {
                "seconds": seconds,
                "tokens": int(rollout.lengths.sum()),
                "longest": int(rollout.lengths.max()),
                "looks": len(looks),
                "most_slots": max(int(np.count_nonzero(look.new_tokens)) for look in looks),
                # That reading this schedule takes at least, prefill left out.
                "needed_bytes": sum(rollout_cases.needed_bytes(sampler, look) for look in looks),
            }
        )
        tokens = np.zeros_like(rollout.tokens)
        for row, sampled, length in zip(tokens, rollout.tokens, rollout.lengths, strict=True):
            row[:length] = form.write(sampled[:length])
        return dataclasses.replace(rollout, tokens=tokens, ended=np.ones_like(rollout.ended))

    return generate_forced


def _with_times(
    open_updates: Callable[..., Any], seconds: dict[str, list[float]]
) -> Callable[..., Any]:
    """Return alignment's `open_updates` whose updates are waited for and timed."""

    def open_timed(*args, **kwargs):
        starts, updates = open_updates(*args, **kwargs)
        return starts, dataclasses.replace(
            updates,
            policy=_waited_for(updates.policy, seconds["policy"]),
            discriminator=_waited_for(updates.discriminator, seconds["discriminator"]),
        )

    return open_timed


def _waited_for(update: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def waited_for(*args):
        begun = time.monotonic()
        done = jax.block_until_ready(update(*args))
        seconds.append(time.monotonic() - begun)
        return done

    return waited_for
