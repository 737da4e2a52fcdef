"""Measure one claim about training, peers in the same call, and write its record.

    python -m benchmarks.train --record=train_sft --out=benchmarks/results/train_sft.json
    python -m benchmarks.train --record=head --size=tiny            (any machine, to try it)

  train_sft      packed SFT with pictures, bf16 states, against the matmul rate and Hugging Face
  train_float32  the same with float32 weights and moments, against bf16 states
  head           loss and gradients of the head, against its four matmuls and the naive head
  shared_prompt  the policy's update with prompts computed once, against repeated prompts
  lora_8b        adapters of an 8B, against PEFT on Hugging Face
  train_scaling  SFT on 1, 2, 4 … devices, bf16 states

Random weights and pictures. Each record takes two to three minutes on one H100. With `--size=tiny`
peers are left out unless `--with_peer` asks for them.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

# Set before JAX starts: the largest runs need nearly the whole card.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.97")

import jax

from benchmarks import kernel_times, records, train_runs
from benchmarks import train_step as variants


def peer(args: argparse.Namespace, *options: str) -> dict | None:
    """Run a peer in a process of its own, before this one takes the device's memory."""
    if args.size == "tiny" and not args.with_peer:
        return None
    command = [sys.executable, "-m", "benchmarks.train_peers", f"--size={args.size}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr[-500:]}
    return json.loads(done.stdout.splitlines()[-1])


def _over(value: float | None, other: dict | None, key: str = "tokens_per_second") -> float | None:
    base = None if other is None else other.get(key)
    return None if value is None or base is None else value / base


def train_sft(args: argparse.Namespace) -> dict:
    """Measure supervised fine-tuning with bf16 states."""
    rows = (
        ("--rows=2", "--row_tokens=4096")
        if args.size != "tiny"
        else ("--rows=1", "--row_tokens=300")
    )
    theirs = peer(args, "--kind=full", *rows)
    rate = variants.matmul_teraflops(256 if args.size == "tiny" else 8192)
    runs = [
        train_runs.sft(args.size, states="bfloat16", remat=remat, options=options)
        for remat, options in (
            ("save_attention_and_dots", {}),
            ("save_attention", train_runs.NO_TRITON),
        )
    ]
    best = max(runs, key=lambda run: run.get("tokens_per_second", 0.0))
    speed = best.get("tokens_per_second")
    share = None if speed is None else 6 * best["matmul_parameters"] * speed / 1e12 / rate
    ratios = {
        "6 N tokens over the matmul rate": records.ratio(share, ">= 0.62"),
        "tokens/s over Hugging Face": records.ratio(_over(speed, theirs), ">= 2.2"),
    }
    return records.make(
        "train_sft",
        "packed SFT, rows of 8192 tokens with pictures, bf16 weights and moments",
        ratios,
        limit="N counts the decoder's matmuls and the head, not the tower, which is computed too; "
        "Hugging Face reads 2 unpacked rows of 4096, its tower frozen as well.",
        raw={"runs": runs, "peer": theirs, "matmul_teraflops": rate},
    )


def train_float32(args: argparse.Namespace) -> dict:
    """Measure the same with float32 master weights and moments."""
    how = {"remat": "save_attention"}
    how["options"] = train_runs.NO_TRITON | train_runs.PLAIN | train_runs.NO_REMAT
    narrow = train_runs.sft(args.size, states="bfloat16", **how)
    wide = train_runs.sft(args.size, states="float32", **how)
    ratios = {
        "fits": records.ratio("error" not in wide, "yes"),
        "tokens/s over bf16 states": records.ratio(
            _over(wide.get("tokens_per_second"), narrow), ">= 0.85"
        ),
    }
    return records.make(
        "train_float32",
        "full SFT with float32 weights and moments on one card",
        ratios,
        limit="gradients, weights and moments are 61.5 GiB, which the update reads and writes in "
        "twice the bytes; weights are cast to bfloat16 layer by layer, forward and backward.",
        raw={"bfloat16": narrow, "float32": wide},
    )


def head(args: argparse.Namespace) -> dict:
    """Measure the head's loss with its gradients."""
    measured = train_runs.head(args.size)
    times, peaks = measured["seconds"], measured["temporary_bytes"]
    ratios = {
        "time over the four matmuls": records.ratio(
            times["chunked"] / times["four_matmuls"], "<= 1.2"
        ),
        "peak over the naive head": records.ratio(peaks["chunked"] / peaks["naive"], "<= 0.3"),
    }
    return records.make(
        "head",
        "log-probs over the whole vocabulary, forward and backward",
        ratios,
        limit="gradients are made in the forward pass, with three matmuls (also in raw); the rest "
        "is the float32 sum of the head's gradient, read and written once a chunk.",
        raw=measured,
    )


def shared_prompt(args: argparse.Namespace) -> dict:
    """Measure the policy's update of one group."""
    expanded = train_runs.policy(args.size, is_shared=False)
    shared = train_runs.policy(args.size, is_shared=True)
    faster = None
    if "error" not in expanded and "error" not in shared:
        faster = expanded["seconds_a_step"] / shared["seconds_a_step"]
    return records.make(
        "shared_prompt",
        "policy update of 16 responses (1200 to 1800 tokens) to a prompt of 1000 with a picture",
        {"time of repeated prompts over shared": records.ratio(faster, ">= 1.4")},
        limit="attention, the head and the optimizer take as long in both.",
        raw={"expanded": expanded, "shared": shared},
    )


def lora_8b(args: argparse.Namespace) -> dict:
    """Measure adapters of rank 16 on all maps of the decoder."""
    if args.size != "tiny":
        args.size = "8b"
    rows = (
        ("--rows=1", "--row_tokens=8192")
        if args.size != "tiny"
        else ("--rows=1", "--row_tokens=300")
    )
    theirs = peer(args, "--kind=lora", *rows)
    ours = train_runs.sft(
        args.size,
        states="bfloat16",
        remat="save_attention",
        options=train_runs.NO_TRITON,
        lora_rank=16,
    )
    ratio = _over(ours.get("tokens_per_second"), theirs)
    return records.make(
        "lora_8b",
        "SFT of adapters of rank 16 on every map of an 8B decoder, rows of 8192 tokens",
        {"tokens/s over PEFT": records.ratio(ratio, ">= 2")},
        limit="the frozen matmuls run forward, again, and backward to the inputs.",
        raw={"ours": ours, "peer": theirs},
    )


def train_scaling(args: argparse.Namespace) -> dict:
    """Measure one row a device on 1, 2, 4 … devices, weights and states spread over them."""
    counts = [n for n in (1, 2, 4, 8) if n <= len(jax.devices())]
    runs = {
        n: train_runs.sft(
            args.size,
            states="bfloat16",
            remat="save_attention",
            options=train_runs.NO_TRITON,
            num_devices=n,
        )
        for n in counts
    }
    one = runs[1].get("tokens_per_second")
    targets = {2: ">= 0.96", 4: ">= 0.94", 8: ">= 0.9"}
    ratios = {
        f"tokens/s a device, {n} over 1": records.ratio(
            None if one is None else runs[n].get("tokens_per_second", 0.0) / n / one, targets[n]
        )
        for n in counts[1:]
    }
    return records.make(
        "train_scaling",
        "SFT on several devices of one host, a row of 8192 tokens a device",
        ratios or {"devices": records.ratio(None, ">= 0.96")},
        limit="weights are gathered layer by layer, gradients scattered, beside the arithmetic.",
        raw={str(n): run for n, run in runs.items()},
    )


RECORDS = {
    run.__name__: run
    for run in (train_sft, train_float32, head, shared_prompt, lora_8b, train_scaling)
}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", choices=RECORDS, required=True)
    parser.add_argument("--size", choices=("tiny", "2b", "4b", "8b"), default="4b")
    parser.add_argument("--with_peer", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(arguments)
    record = RECORDS[args.record](args)
    records.emit(record, args.out)
    kernel_times.say(f"{args.record}: {record['ratio']}, met: {record['is_met']}")


if __name__ == "__main__":
    main()
