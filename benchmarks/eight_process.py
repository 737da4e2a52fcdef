"""One process of a job of `benchmarks.eight_gpus`: the program, watched, with forced responses.

    PRISM_EIGHT=settings.json python -m benchmarks.eight_process sft --config=…

The command is that of `python -m prism_jax`. Added are notes, written at the end: the time to the
first update, the times of rollouts and of saving, and the peak memory of the process's devices.

A policy of random weights neither ends a response nor writes a tag. So each response is given a
limit, log-normal over the responses of a call, and its tokens are written over: the tags of the
format, words of the corpus chosen by the sampled tokens, a digit as the answer, the end of the
turn. All later work, the discriminator's included, is then that of a policy that keeps the format;
only the ratios between the sampler's and the trainer's log-probs mean nothing.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import transformers

from benchmarks import rollout_cases
from prism_jax import main as program
from prism_jax.checkpoints import checkpoint
from prism_jax.rollout import engine
from prism_jax.running import loop

SETTINGS = "PRISM_EIGHT"  # the variable that names the file of `Settings`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The orders of the parent process to its children."""

    begun: float  # `time.time()` at the start of the job
    notes: str  # folder of the notes
    tokenizer: str  # folder
    mean_tokens: int  # of a response, before the limits


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


def forced(
    generate: Callable[..., engine.Rollout], form: Form, mean_tokens: int, notes: list
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
            **options,
        )
        seconds = time.monotonic() - begun
        notes.append({"seconds": seconds, "tokens": int(rollout.lengths.sum())})
        tokens = np.zeros_like(rollout.tokens)
        for row, sampled, length in zip(tokens, rollout.tokens, rollout.lengths, strict=True):
            row[:length] = form.write(sampled[:length])
        return dataclasses.replace(rollout, tokens=tokens, ended=np.ones_like(rollout.ended))

    return generate_forced


def timed(method: Callable[..., Any], notes: list[float]) -> Callable[..., Any]:
    """Return a method whose every call notes its seconds."""

    def call(self, *args, **kwargs):
        begun = time.monotonic()
        try:
            return method(self, *args, **kwargs)
        finally:
            notes.append(time.monotonic() - begun)

    return call


def noting_first_update(
    run: Callable[..., Any], begun: float, notes: dict[str, Any]
) -> Callable[..., Any]:
    """Return `loop.run` that waits for the first update and notes the seconds since `begun`."""

    def run_noting(stage: loop.Stage, *args, **kwargs):
        def update(state, batch, key):
            state, metrics = stage.update(state, batch, key)
            if "first_update_seconds" not in notes:
                jax.block_until_ready(metrics)
                notes["first_update_seconds"] = time.time() - begun
            return state, metrics

        return run(dataclasses.replace(stage, update=update), *args, **kwargs)

    return run_noting


def _devices() -> dict[str, Any]:
    """Return the devices of the job, and the peak memory of those of this process."""
    stats = {str(device.id): device.memory_stats() for device in jax.local_devices()}
    return {
        "device_kind": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        # A CPU reports none.
        "peak_bytes": {
            number: one["peak_bytes_in_use"] for number, one in stats.items() if one is not None
        },
    }


def main(argv: Sequence[str]) -> int:
    """Run a command of the program with the hooks; write the notes and return the exit code."""
    settings = Settings(**json.loads(pathlib.Path(os.environ[SETTINGS]).read_text()))
    notes: dict[str, Any] = {"rollouts": [], "save_seconds": [], "save_wait_seconds": []}
    engine.Engine.generate = forced(
        engine.Engine.generate, Form.of(settings.tokenizer), settings.mean_tokens, notes["rollouts"]
    )
    loop.run = noting_first_update(loop.run, settings.begun, notes)
    manager = checkpoint.Checkpointer
    manager.save = timed(manager.save, notes["save_seconds"])
    manager.wait = timed(manager.wait, notes["save_wait_seconds"])
    code = 1
    try:
        code = program.main(argv)
    finally:
        # Of a wrong input there is nothing to note, and JAX may not have started.
        if code != 2:
            notes |= _devices() | {"seconds": time.time() - settings.begun}
            process = os.environ.get("PRISM_PROCESS_ID", "0")
            text = json.dumps(notes, indent=1)
            pathlib.Path(settings.notes, f"process_{process}.json").write_text(text + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
