"""Time Hugging Face `generate` on the benchmarks' rollouts; a process of its own.

    python -m benchmarks.rollout_hf --size=4b --uniform 64 256 --steps 48 16 --after 0 1900 3800

Prints a line of JSON a case, with the seconds of the prefill and of each step behind it. Needs
torch and transformers, and no JAX. Rows of a batch wait for the longest, as `generate` does. The
cache is the one that `generate` takes without being told, which grows.
"""

import argparse
import json
import time

import numpy as np
import torch
import transformers

from benchmarks import sizes


def _model(size: str, device: str) -> torch.nn.Module:
    values = sizes.config_json(sizes.SIZES[size])
    config = transformers.AutoConfig.for_model(**values)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def _prompt(size: str, device: str, more_words: int) -> dict[str, torch.Tensor]:
    """Return a prompt of the benchmarks, 324 tokens and `more_words` more."""
    example = sizes.example(sizes.SIZES[size], num_words=66 + more_words)
    arrays = {
        "input_ids": example["tokens"][None],
        "attention_mask": np.ones_like(example["tokens"][None]),
        "mm_token_type_ids": example["token_types"][None],
        "pixel_values": example["pixels"],
        "image_grid_thw": example["grids"],
    }
    prompt = {name: torch.from_numpy(value).to(device) for name, value in arrays.items()}
    return prompt | {"pixel_values": prompt["pixel_values"].to(torch.bfloat16)}


class _Clock(transformers.StoppingCriteria):
    """Notes when each token is drawn, and stops nothing; `generate` waits for each by itself."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate(
    model: torch.nn.Module, prompt: dict[str, torch.Tensor], *, rows: int, tokens: int
) -> tuple[float, list[float]]:
    """Return the seconds of the prefill with the first token, and those of each further one."""
    batch = {name: x.repeat(rows, *[1] * (x.ndim - 1)) for name, x in prompt.items()}
    clock, begun = _Clock(), time.perf_counter()
    with torch.no_grad():
        model.generate(
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
    return clock.stamps[0] - begun, np.diff(clock.stamps).tolist()


def _print(result: dict) -> None:
    print(json.dumps(result), flush=True)


def main() -> None:
    """Time one uniform batch, and steps behind prompts of several lengths."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=sizes.SIZES, required=True)
    parser.add_argument("--uniform", type=int, nargs=2, metavar=("ROWS", "TOKENS"), required=True)
    parser.add_argument("--steps", type=int, nargs=2, metavar=("ROWS", "STEPS"), action="append")
    parser.add_argument("--after", type=int, nargs="+", help="words more in the prompts of --steps")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begun = time.perf_counter()
    model = _model(args.size, device)
    _generate(model, _prompt(args.size, device, 0), rows=1, tokens=4)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    _print({"case": "open", "seconds": time.perf_counter() - begun, "versions": versions})
    rows, tokens = args.uniform
    prefill, steps = _generate(model, _prompt(args.size, device, 0), rows=rows, tokens=tokens)
    seconds = prefill + sum(steps)
    _print(
        {
            "case": "uniform",
            "rows": rows,
            "tokens": tokens,
            "prefill_seconds": prefill,
            "seconds": seconds,
            "tokens_per_second": rows * tokens / seconds,
            "step_seconds": float(np.median(steps)),
        }
    )
    for rows, num_steps in args.steps or ():
        for words in args.after:
            prompt = _prompt(args.size, device, words)
            try:
                prefill, steps = _generate(model, prompt, rows=rows, tokens=num_steps + 1)
            except torch.cuda.OutOfMemoryError as error:
                _print({"case": "none", "rows": rows, "after": words, "error": str(error)[:300]})
                torch.cuda.empty_cache()
                continue
            median = float(np.median(steps))
            result = {"case": "steps", "rows": rows, "after": words, "prefill_seconds": prefill}
            _print(result | {"step_seconds": median})
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
