"""The peers of the training records: Hugging Face, and PEFT on it; a process of its own.

    python -m benchmarks.train_peers --kind=full --size=4b --rows=2 --row_tokens=4096

Prints one line of JSON. Random weights, gradient checkpointing, SDPA, fused AdamW; one picture of
512 x 512 pixels in each row; the vision tower is frozen, as in the runs it is compared with.
"""

import argparse
import importlib
import json
import time

import torch
import transformers

from benchmarks import sizes


def _model(args: argparse.Namespace, device: str) -> torch.nn.Module:
    values = sizes.config_json(sizes.SIZES[args.size])
    config = transformers.AutoConfig.for_model(**values)
    dtype = getattr(torch, args.dtype)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.model.visual.requires_grad_(False)
    if args.kind == "lora":
        # Not installed where no adapter is measured.
        peft = importlib.import_module("peft")
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=args.rank,
                lora_alpha=2 * args.rank,
                target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
            ),
        )
        model.enable_input_require_grads()
    return model.train()


def _batch(args: argparse.Namespace, device: str) -> dict[str, torch.Tensor]:
    shown = 256 + 2  # a picture's tokens and its marks
    example = sizes.example(sizes.SIZES[args.size], num_words=args.row_tokens - shown)
    repeated = {
        "input_ids": torch.from_numpy(example["tokens"])[None].repeat(args.rows, 1),
        "mm_token_type_ids": torch.from_numpy(example["token_types"])[None].repeat(args.rows, 1),
        "pixel_values": torch.from_numpy(example["pixels"]).repeat(args.rows, 1),
        "image_grid_thw": torch.from_numpy(example["grids"]).repeat(args.rows, 1),
    }
    batch = {name: value.to(device) for name, value in repeated.items()}
    batch["pixel_values"] = batch["pixel_values"].to(getattr(torch, args.dtype))
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch | {"labels": batch["input_ids"]}


def main() -> None:
    """Time the steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("full", "lora"), required=True)
    parser.add_argument("--size", choices=sizes.SIZES, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--row_tokens", type=int, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model, batch = _model(args, device), _batch(args, device)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-6, fused=device == "cuda")
    seconds = []
    for _ in range(args.steps + 2):
        begun = time.perf_counter()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    measured = sorted(seconds[2:])
    median = measured[len(measured) // 2]
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    record = {
        "peer": f"transformers {transformers.__version__}",
        **vars(args),
        "seconds_a_step": measured,
        "tokens_per_second": args.rows * args.row_tokens / median,
        "peak_gigabytes": peak,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
