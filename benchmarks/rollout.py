"""Measure rollouts against what their bytes must take; write a record.

    python -m benchmarks.rollout --record=rollout_steady --out=FILE.json      (one GPU)
    python -m benchmarks.rollout --record=rollout_ragged --out=FILE.json      (one GPU)
    python -m benchmarks.rollout --record=rollout_scaling --out=FILE.json     (several GPUs)
    python -m benchmarks.rollout --record=tpu_decode --out=FILE.json          (libtpu, no TPU)

`--size=tiny` runs anywhere and measures nothing worth keeping. Weights are random; whatever a
figure is compared with is measured in the same call. Peers: `benchmarks.rollout_against`.

  record           what is timed                                        compared with
  rollout_steady   decoding with every slot running                     the copy bandwidth
  rollout_ragged   32 prompts with a picture x 16, log-normal lengths   the copy bandwidth
  rollout_scaling  16 prompts x 16 a device, 256 tokens                 one device
  tpu_decode       bytes of a compiled step                             bytes that must be read
"""

import argparse
import importlib
import os
import pathlib
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
    case = rollout_cases.ragged(is_tiny=is_tiny)
    rate, sampler = _rate(size), _sampler(config)
    examples = rollout_cases.image_prompts(config, case.prompts)
    limits, most = case.limits, case.most
    work = {"num_responses": case.responses, "num_slots": None, "max_tokens": most}
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
