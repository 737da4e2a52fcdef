"""Write a checkpoint of random weights with transformers, and what transformers computes with it.

    python benchmarks/reference_checkpoint.py --size=4b --out=DIR

Needs torch. `DIR/model` is what `save_pretrained` writes in bfloat16; `DIR/reference.npz` holds one
packed example (its tokens, token types, grids, pixels) and the logits of its last places by the
same weights in bfloat16 and in float32.
"""

import argparse
import pathlib
import time

import numpy as np
import torch
import transformers

from benchmarks import sizes

NUM_LOGITS = 64  # places whose logits are kept


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=sizes.SIZES, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = sizes.config_json(sizes.SIZES[args.size])
    config = transformers.AutoConfig.for_model(**values)
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        # Norms away from 1, so that a norm left out would show.
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(args.out / "model")
    print(f"wrote {args.out / 'model'} in {time.perf_counter() - start:.1f} s", flush=True)

    example = sizes.example(sizes.SIZES[args.size])
    given = {
        "input_ids": example["tokens"][None],
        "attention_mask": np.ones_like(example["tokens"][None]),
        "mm_token_type_ids": example["token_types"][None],
        "pixel_values": example["pixels"],
        "image_grid_thw": example["grids"],
    }
    given = {name: torch.from_numpy(value).to(device) for name, value in given.items()}
    logits = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = model.to(dtype)
        with torch.no_grad():
            out = model(**given, logits_to_keep=NUM_LOGITS).logits[0]
        logits[str(dtype).removeprefix("torch.")] = out.float().cpu().numpy()
    np.savez(args.out / "reference.npz", **example, **logits)
    print("computed the reference logits", flush=True)


if __name__ == "__main__":
    main()
