"""Measure rollouts against what their bytes must take, and against a peer; write a record.

    python -m benchmarks.rollout --record=rollout_steady --out=FILE.json      (one GPU)
    python -m benchmarks.rollout --record=rollout_ragged --out=FILE.json      (one GPU)
    python -m benchmarks.rollout --record=rollout_hf --out=FILE.json          (one GPU, torch)
    python -m benchmarks.rollout --record=rollout_scaling --out=FILE.json     (several GPUs)
    python -m benchmarks.rollout --record=tpu_decode --out=FILE.json          (libtpu, no TPU)

`--size=tiny` runs anywhere and measures nothing worth keeping. Weights are random; whatever a
figure is compared with is measured in the same call.

  record           what is timed                                        compared with
  rollout_steady   decoding with every slot running                     the copy bandwidth
  rollout_ragged   32 prompts with a picture x 16, log-normal lengths   the copy bandwidth
  rollout_hf       64 rows x 256 tokens; log-normal lengths             Hugging Face `generate`
  rollout_scaling  16 prompts x 16 a device, 256 tokens                 one device
  tpu_decode       bytes of a compiled step                             bytes that must be read
"""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import kernel_times, records, rollout_cases, sizes
from models.config import Qwen3VLConfig

_CHUNK_TOKENS = 32


def _sampler(
    config: Qwen3VLConfig, num_devices: int = 1, *, chunk_tokens: int = _CHUNK_TOKENS
) -> rollout_cases.Sampler:
    devices = jax.devices()[:num_devices]
    return rollout_cases.random_sampler(config, devices, chunk_tokens=chunk_tokens, tensor=1)


def _rate(size: str) -> float:
    return rollout_cases.copy_rate(0.02 if size == "tiny" else 2.0)


def steady(size: str) -> dict:
    """Time decoding with all slots running, at three shapes."""
    config, is_tiny = sizes.SIZES[size], size == "tiny"
    rate, cases = _rate(size), []
    sampler = _sampler(config, chunk_tokens=8 if is_tiny else _CHUNK_TOKENS)
    # Prompts, responses to each, tokens of a prompt and of a response, and the target.
    for prompts, responses, prompt_tokens, tokens, target in (
        (4, 16, 324, 256, 0.80),
        (16, 16, 324, 256, 0.82),
        (48, 1, 2000, 1024, 0.90),
    ):
        if is_tiny:
            prompts, prompt_tokens, tokens = 2, 20, 32
        texts = rollout_cases.text_prompts(config, prompts, prompt_tokens)
        work = {
            "num_responses": responses,
            "limits": [tokens] * (prompts * responses),
            "num_slots": None,
            "max_tokens": tokens,
        }
        rollout_cases.run(sampler, texts, **work)
        timed = rollout_cases.run(sampler, texts, **work)
        figures = rollout_cases.steady(sampler, timed, rate=rate)
        shape = {"prompts": prompts, "responses": responses, "target": target}
        shape |= {"prompt_tokens": prompt_tokens, "response_tokens": tokens}
        cases.append(shape | figures)
        kernel_times.report(cases[-1])
    return {
        "claim": "steady decoding over the time that reading its bytes takes at the copy bandwidth",
        "ratios": {
            f"{case['prompts']} prompts x {case['responses']} responses": records.ratio(
                case["of_copy"], f">= {case['target']}"
            )
            for case in cases
        },
        "limit": "kernels between the matrix products, and matrix products of few rows",
        "raw": {"copy_terabytes_per_second": rate / 1e12, "cases": cases},
    }


def ragged(size: str) -> dict:
    """Time a whole rollout of log-normal lengths."""
    config, is_tiny = sizes.SIZES[size], size == "tiny"
    prompts, responses, mean, most = (2, 4, 12, 40) if is_tiny else (32, 16, 1550, 8192)
    rate, sampler = _rate(size), _sampler(config)
    examples = rollout_cases.image_prompts(config, prompts)
    limits = rollout_cases.lengths(prompts * responses, mean=mean, most=most)
    work = {"num_responses": responses, "num_slots": None, "max_tokens": most}
    # The same slots, with little to draw, compile what the rollout needs.
    warm = rollout_cases.run(sampler, examples, limits=[4] * len(limits), **work)
    kernel_times.report({"warm_seconds": warm.seconds})
    timed = rollout_cases.run(sampler, examples, limits=limits.tolist(), **work)
    ideal = sum(rollout_cases.needed_bytes(sampler, look) for look in timed.looks) / rate
    first = timed.stamps[0]
    slots = [int(np.count_nonzero(look.new_tokens)) for look in timed.looks]
    tokens_per_second = timed.num_tokens / timed.seconds
    return {
        "claim": "a whole ragged rollout over the time that reading the bytes of its own schedule "
        "takes at the copy bandwidth, prefill included in the rollout",
        "ratios": {
            "of the copy bandwidth": records.ratio(ideal / timed.seconds, ">= 0.65"),
            "tokens a second": records.ratio(tokens_per_second, ">= 4500"),
        },
        "limit": "the steady ratio, prefill, and slots that wait for the end of a chunk",
        "raw": {
            "copy_terabytes_per_second": rate / 1e12,
            "tokens_per_second": tokens_per_second,
            "seconds": timed.seconds,
            "seconds_to_first_look": first,
            "ideal_seconds": ideal,
            "tokens": timed.num_tokens,
            "mean_length": float(limits.mean()),
            "longest": int(limits.max()),
            "slots_running": {"most": max(slots), "mean": float(np.mean(slots))},
            "looks": len(timed.looks),
        },
    }


def _peer(size: str, rows: list[int], lengths: list[int]) -> dict:
    """Return the figures of the peer, from a process that ends before JAX takes the memory."""
    command = [sys.executable, "-m", "benchmarks.rollout_peer", f"--size={size}", "--rows"]
    command += [*map(str, rows), "--lengths", *map(str, lengths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def against_hf(size: str) -> dict:
    """Time the same work in Hugging Face `generate` and here."""
    is_tiny = size == "tiny"
    prompts, rows, tokens = (2, [4], 16) if is_tiny else (4, [64], 256)
    uniform = [tokens] * rows[0]
    # An eighth of the ragged rollout's lengths, and a quarter of its prompts: the peer decodes as
    # many steps as its longest row.
    ragged_lengths = rollout_cases.lengths(
        8 if is_tiny else 128, mean=12 if is_tiny else 194, most=1024
    )
    peers = [_peer(size, rows, uniform), _peer(size, [128], ragged_lengths.tolist())]
    config = sizes.SIZES[size]
    sampler, comparisons = _sampler(config), []
    for limits, peer, target in ((uniform, peers[0], 15), (ragged_lengths.tolist(), peers[1], 30)):
        count = prompts if limits is uniform else max(1, len(limits) // 16)
        work = {"num_responses": len(limits) // count, "limits": limits, "num_slots": None}
        work |= {"max_tokens": max(limits)}
        examples = rollout_cases.image_prompts(config, count)
        rollout_cases.run(sampler, examples, **work)
        timed = rollout_cases.run(sampler, examples, **work)
        ours = timed.num_tokens / timed.seconds
        theirs = max(run["tokens_per_second"] for run in peer["runs"])
        comparisons.append({"ours": ours, "peer": theirs, "ratio": ours / theirs, "target": target})
        kernel_times.report(comparisons[-1])
    names = ("64 rows x 256 tokens", "log-normal lengths")
    return {
        "claim": "tokens a second of a whole rollout over those of Hugging Face generate, 64 "
        "rows x 256 tokens and 128 log-normal lengths of mean 194 to 1024",
        "ratios": {
            name: records.ratio(one["ratio"], f">= {one['target']}")
            for name, one in zip(names, comparisons, strict=True)
        },
        "limit": "the steady ratio and prefill",
        "raw": {"uniform": comparisons[0], "ragged": comparisons[1], "peer_runs": peers},
    }


def scaling(size: str) -> dict:
    """Time the same work a device on 1, 2 and 4 devices, from weights cut as in training."""
    config, is_tiny = sizes.SIZES[size], size == "tiny"
    prompts, responses, tokens = (1, 4, 16) if is_tiny else (16, 16, 256)
    rates = {}
    for count in (1, 2, 4):
        if count > len(jax.devices()):
            break
        sampler = _sampler(config, count)
        examples = rollout_cases.image_prompts(config, prompts * count)
        work = {
            "num_responses": responses,
            "limits": [tokens] * (prompts * responses * count),
            "num_slots": None,
            "max_tokens": tokens,
        }
        rollout_cases.run(sampler, examples, **work)
        runs = [rollout_cases.run(sampler, examples, **work) for _ in range(3)]
        rates[count] = float(np.median([run.num_tokens / run.seconds for run in runs])) / count
        kernel_times.report({"devices": count, "tokens_per_second_a_device": rates[count]})
        del sampler
    if len(rates) < 2:
        raise SystemExit("rollout_scaling needs at least two devices")
    targets = {2: 0.97, 4: 0.95}
    ratios = {count: rate / rates[1] for count, rate in rates.items() if count > 1}
    return {
        "claim": "tokens a second and device of a rollout on 2 and 4 devices over those on one",
        "ratios": {
            f"{count} devices": records.ratio(ratio, f">= {targets[count]}")
            for count, ratio in ratios.items()
        },
        "limit": "work that does not shrink with more devices: the host prepares the prompts one "
        "after another and waits for each chunk; the two were not measured apart",
        "raw": {"tokens_per_second_a_device": rates, "ratios": ratios},
    }


def tpu_decode(size: str) -> dict:
    """Compile for TPUs; loaded here, as it needs more packages than a rollout does."""
    return importlib.import_module("benchmarks.tpu_decode").measure(size)


_RECORDS: dict[str, Callable[[str], dict]] = {
    "rollout_steady": steady,
    "rollout_ragged": ragged,
    "rollout_hf": against_hf,
    "rollout_scaling": scaling,
    "tpu_decode": tpu_decode,
}


def main() -> None:
    """Measure, print the record and write it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", choices=_RECORDS, required=True)
    parser.add_argument("--size", choices=list(sizes.SIZES), default="4b")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    # The sampler fills the memory; read when JAX first asks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    measured = _RECORDS[args.record](args.size)
    measured["raw"]["size"] = args.size
    device = f"{jax.devices()[0].device_kind} x {len(jax.devices())}"
    record = records.make(args.record, **measured, module="benchmarks.rollout", device=device)
    records.emit(record, args.out)


if __name__ == "__main__":
    main()
