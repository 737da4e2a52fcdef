"""Time Hugging Face `generate` on the benchmarks' rollouts, in a process of its own.

    python -m benchmarks.rollout_peer --size=4b --rows 64 --lengths 256 256 …

Prints one line of JSON. Needs torch and transformers, and no JAX. Rows of a batch wait for the
longest, as `generate` does; each is as long as its limit says.
"""

import argparse
import json
import time

import numpy as np
import torch
import transformers

from benchmarks import sizes


def _model(size: str, device: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    values = sizes.config_json(sizes.SIZES[size])
    config = transformers.AutoConfig.for_model(**values)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    example = sizes.example(sizes.SIZES[size])
    given = {
        "input_ids": example["tokens"][None],
        "attention_mask": np.ones_like(example["tokens"][None]),
        "mm_token_type_ids": example["token_types"][None],
        "pixel_values": example["pixels"],
        "image_grid_thw": example["grids"],
    }
    given = {name: torch.from_numpy(value).to(device) for name, value in given.items()}
    given["pixel_values"] = given["pixel_values"].to(torch.bfloat16)
    return model.eval(), given


def _generate(model: torch.nn.Module, given: dict, rows: int, tokens: int) -> float:
    """Return the seconds of a batch that decodes `tokens` tokens."""
    batch = {name: x.repeat(rows, *[1] * (x.ndim - 1)) for name, x in given.items()}
    begun = time.perf_counter()
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
        )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    """Time one uniform batch, or a list of lengths in batches of `rows`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=sizes.SIZES, required=True)
    parser.add_argument("--rows", type=int, nargs="+", required=True, help="sizes of a batch")
    parser.add_argument("--lengths", type=int, nargs="+", required=True)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, given = _model(args.size, device)
    _generate(model, given, min(args.rows), 4)
    runs = []
    for rows in args.rows:
        begun = time.perf_counter()
        for first in range(0, len(args.lengths), rows):
            batch = args.lengths[first : first + rows]
            _generate(model, given, len(batch), max(batch))
        seconds = time.perf_counter() - begun
        rate = sum(args.lengths) / seconds
        runs.append({"rows": rows, "seconds": seconds, "tokens_per_second": rate})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"runs": runs, "versions": versions}))


if __name__ == "__main__":
    main()
