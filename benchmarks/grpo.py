"""Measure a whole GRPO step against TRL's, both on one GPU in one call; write the record.

    python -m benchmarks.grpo --out=benchmarks/results/grpo_trl.json        (one GPU, trl)
    python -m benchmarks.grpo --size=tiny                                   (any machine, to try it)

The same work on both sides: 4 prompts of 324 tokens with a picture, 16 responses to each, of
log-normal lengths (mean 165, to 512) that are forced; every second response has a reward; all
weights are trained, weights and moments bfloat16. About four minutes on an H100: TRL's step behind
a short one, and two of ours behind one that compiles.
"""

import argparse
import os
import pathlib
import statistics
from typing import Any

# Set before JAX starts: the update needs nearly the whole card.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax

from benchmarks import grpo_step, peers, records, rollout_cases

_LIMIT_SECONDS = 240.0  # of TRL
_TRL_ROWS = 8  # of a forward and backward pass


def work_of(size: str) -> grpo_step.Work:
    """Return the responses of a step, the same for both sides."""
    if size == "tiny":
        lengths = rollout_cases.lengths(8, mean=6, most=12)
        shape = {"prompts": 2, "responses": 4, "side": 4, "row_tokens": 256, "row_sequences": 8}
    else:
        lengths = rollout_cases.lengths(64, mean=192, most=512)
        shape = {"prompts": 4, "responses": 16, "side": 32, "row_tokens": 4096, "row_sequences": 16}
    return grpo_step.Work(lengths=tuple(lengths.tolist()), **shape)


def measure(size: str) -> dict[str, Any]:
    """Measure TRL first, which needs the memory, then our side."""
    work = work_of(size)
    rows = min(_TRL_ROWS, len(work.lengths))
    options = [f"--size={size}", f"--responses={work.responses}", f"--rows={rows}"]
    options += [f"--side={work.side}", "--lengths", *map(str, work.lengths)]
    theirs = peers.run("benchmarks.grpo_trl", options, limit_seconds=_LIMIT_SECONDS)
    ours, error = [], None
    try:
        for timed in grpo_step.steps(size, work, num_steps=3):
            ours.append(timed)
    except jax.errors.JaxRuntimeError as failure:
        error = str(failure)[:500]
    # The first step of each side compiles, or warms up.
    whole, own = ([one["seconds"] for one in steps[1:]] for steps in (theirs.of("step"), ours))
    ratio = statistics.mean(whole) / statistics.mean(own) if whole and own else None
    return {
        "claim": "a whole GRPO step, 4 prompts with a picture x 16 responses of forced log-normal "
        "lengths (mean 165, to 512): seconds of TRL (no vLLM) over ours",
        "ratios": {"seconds of TRL over ours": records.ratio(ratio, ">= 8")},
        "limit": "TRL draws all 64 responses in one batch by Hugging Face generate, which waits "
        "for the longest, and repeats prompts and pictures; both train all weights, weights and "
        "moments bfloat16, ours rounded stochastically. TRL's is one step, ours the mean of two",
        "raw": {
            "ours": {"steps": ours, "error": error},
            "peer": {"lines": theirs.lines, "error": theirs.error},
            "tokens": sum(work.lengths),
            "size": size,
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the record and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("tiny", "4b"), default="4b")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(arguments)
    record = records.make("grpo_trl", **measure(args.size), module="benchmarks.grpo")
    records.emit(record, args.out)


if __name__ == "__main__":
    main()
