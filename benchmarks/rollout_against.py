"""Measure rollouts against a peer's, both on one GPU in one call; write a record.

    python -m benchmarks.rollout_against --record=rollout_hf --ragged=RAGGED.json --out=FILE.json
    python -m benchmarks.rollout_against --record=rollout_tunix --ragged=RAGGED.json --out=FILE.json

  rollout_hf     Hugging Face `generate`, prompts with a picture; needs torch
  rollout_tunix  tunix's sampler, prompts of text; needs google-tunix

Two works are compared. 64 rows x 256 tokens are timed whole on both sides. The lengths of
`rollout_ragged` would keep a peer busy for an hour: it draws them in batches that each wait for
their longest response, so its time is the sum of its prefills and steps, each as long as it was
measured at that size of the cache. RAGGED.json is the record `rollout_ragged` of the same GPU, by
`benchmarks.rollout`; without it our side of these lengths is measured here, in three minutes.

Each takes about two minutes and a half besides. `--size=tiny` runs anywhere and measures nothing
worth keeping.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import kernel_times, peers, records, rollout, rollout_cases, sizes

_PROMPT_TOKENS = 324  # of `sizes.example`, and of the prompts of text
_LIMIT_SECONDS = 330.0  # of a peer
_PEERS = {"rollout_hf": "benchmarks.rollout_hf", "rollout_tunix": "benchmarks.rollout_tunix"}


def _peer(name: str, size: str) -> peers.Results:
    """Run the peer on 64 rows, or on more where it may be faster, and on steps of long caches."""
    if name == "rollout_hf":
        # Caches grow: 48 rows have room for 8192 tokens each, as a batch must.
        options = {
            "tiny": "--uniform 4 8 --steps 2 4 --after 0 16",
            "4b": "--uniform 64 256 --steps 24 16 --steps 48 16 --after 0 1900 3800",
        }[size]
    else:
        options = {
            "tiny": "--prompt_tokens=24 --uniform 4 8 --cache=64 --steps 4",
            "4b": f"--prompt_tokens={_PROMPT_TOKENS} --uniform 64 256 --uniform 128 256 "
            f"--cache={_PROMPT_TOKENS + rollout_cases.ragged(is_tiny=False).most} --steps 32 24 16",
        }[size]
    arguments = [f"--size={size}", *options.split()]
    return peers.run(_PEERS[name], arguments, limit_seconds=_LIMIT_SECONDS)


def _uniform(name: str, size: str) -> dict[str, Any]:
    """Time our side of 64 rows x 256 tokens, prefill included, the second of two times."""
    config, is_tiny = sizes.SIZES[size], size == "tiny"
    prompts, responses, tokens = (2, 2, 8) if is_tiny else (4, 16, 256)
    sampler = rollout_cases.random_sampler(config, jax.devices()[:1], chunk_tokens=32, tensor=1)
    if name == "rollout_hf":
        examples = rollout_cases.image_prompts(config, prompts)
    else:
        examples = rollout_cases.text_prompts(config, prompts, _PROMPT_TOKENS)
    work = {"num_responses": responses, "limits": [tokens] * (prompts * responses)}
    work |= {"num_slots": None, "max_tokens": tokens}
    rollout_cases.run(sampler, examples, **work)
    timed = rollout_cases.run(sampler, examples, **work)
    figures = {"seconds": timed.seconds, "tokens_per_second": timed.num_tokens / timed.seconds}
    kernel_times.report({"ours": "uniform", **figures})
    return figures


def peer_on_ragged(lengths: Sequence[int], results: peers.Results) -> list[dict[str, Any]]:
    """Return the peer's time for these lengths, for each number of rows that it was timed with."""
    by_rows: dict[int, list[dict[str, Any]]] = {}
    for one in results.of("steps"):
        by_rows.setdefault(one["rows"], []).append(one)
    figures = []
    for rows, timed in by_rows.items():
        seconds = peers.batched_seconds(
            lengths,
            rows,
            prefill_seconds=timed[0]["prefill_seconds"],
            steps=[(one["after"], one["step_seconds"]) for one in timed],
        )
        rate = sum(lengths) / seconds
        figures.append({"rows": rows, "seconds": seconds, "tokens_per_second": rate})
    return figures


def ragged_record(path: pathlib.Path, size: str) -> dict[str, Any]:
    """Return what `rollout_ragged` measured; it must be of these lengths and of this device."""
    record = json.loads(path.read_text())
    limits = rollout_cases.ragged(is_tiny=size == "tiny").limits
    device = f"{jax.devices()[0].device_kind} x {len(jax.devices())}"
    expected = {"record": "rollout_ragged", "device": device}
    actual = {name: record.get(name) for name in expected}
    expected["tokens"], actual["tokens"] = int(limits.sum()), record["raw"]["tokens"]
    if actual != expected:
        raise SystemExit(f"--ragged={path} must be a record of {expected}, got {actual}")
    return record["raw"]


def _over(ours: float, theirs: list[float]) -> float | None:
    return ours / max(theirs) if theirs else None


def measure(name: str, size: str, ragged: pathlib.Path | None) -> dict[str, Any]:
    """Measure the peer first, which needs the memory, then our side."""
    results = _peer(name, size)
    lengths = rollout_cases.ragged(is_tiny=size == "tiny").limits.tolist()
    theirs = peer_on_ragged(lengths, results)
    kernel_times.report({"peer": "ragged", "by_rows": theirs})
    uniform = _uniform(name, size)
    # It holds the memory no more.
    ours = rollout.ragged(size)["raw"] if ragged is None else ragged_record(ragged, size)
    same = results.of("uniform")[:1]  # as many rows as ours
    over = {
        "64 rows x 256 tokens": _over(
            uniform["tokens_per_second"], [one["tokens_per_second"] for one in same]
        ),
        "log-normal lengths of rollout_ragged": _over(
            ours["tokens_per_second"], [one["tokens_per_second"] for one in theirs]
        ),
    }
    peer, targets, limit = {
        "rollout_hf": (
            "Hugging Face generate",
            (15, 30),
            "the peer's steps behind more than 4100 tokens are counted as those behind 4100. ",
        ),
        "rollout_tunix": (
            "tunix's sampler",
            (1.8, 8),
            "ours has four prompts for the 64 rows and stores each once, the peer 64; its lengths "
            "behind pictures, which the peer has not, are those of rollout_ragged. ",
        ),
    }[name]
    limit += "The peer's time for the log-normal lengths is the sum of its measured prefills and "
    limit += "steps over its batches, in the number of rows that is best of those that fit"
    return {
        "claim": f"tokens a second of a whole rollout over those of {peer}: 64 rows x 256 tokens "
        f"behind {_PROMPT_TOKENS}; 512 responses of log-normal lengths, mean 1447, to 8192",
        "ratios": {
            what: records.ratio(value, f">= {target}")
            for (what, value), target in zip(over.items(), targets, strict=True)
        },
        "limit": limit,
        "raw": {
            "uniform": {"ours": uniform, "peer": results.of("uniform")},
            "ragged": {"ours": ours, "peer": theirs},
            "peer": {"lines": results.lines, "error": results.error},
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the record and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", choices=_PEERS, required=True)
    parser.add_argument("--size", choices=("tiny", "4b"), default="4b")
    parser.add_argument("--ragged", type=pathlib.Path, help="a record of rollout_ragged")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(arguments)
    # The sampler fills the memory; read when JAX first asks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    measured = measure(args.record, args.size, args.ragged)
    measured["raw"]["size"] = args.size
    device = f"{jax.devices()[0].device_kind} x {len(jax.devices())}"
    module = "benchmarks.rollout_against"
    record = records.make(args.record, **measured, module=module, device=device)
    records.emit(record, args.out)


if __name__ == "__main__":
    main()
