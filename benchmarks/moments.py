"""Train with moments in float32, bfloat16 and 8 bits and record how far the losses lie apart.

    python -m prism_jax data numerals --out=runs/numerals --rows=base=200
    python -m benchmarks.moments --data=runs/numerals --out=benchmarks/results/moments.json

Supervised fine-tuning of a new tiny model on the embedded corpus, by the stage's own feed, loss and
update. A seed decides weights and rows; each kind of moments sees the same. Rounding of moments
with few bits is stochastic; weights are float32.
"""

import argparse
import importlib
import pathlib
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks import records
from prism_jax import configuration, metrics
from prism_jax.setup import agreement
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.sft import config as sft_config
from prism_jax.stages.sft import feed as sft_feed
from prism_jax.stages.sft import step as sft_step

_KINDS = ("float32", "bfloat16", "8bit")
_LAST = 10  # steps whose mean loss is compared


def _options(args: argparse.Namespace, kind: str, seed: int) -> sft_config.Config:
    config = importlib.import_module("configs.sft").get_config("tiny,new")
    config.seed = seed
    config.model.folder = str(args.tokenizer)
    config.data.train = (f"{args.data}/sft/dataset_info.json#numerals_base",)
    config.data.row_tokens, config.data.row_examples = args.row_tokens, 2
    config.train.num_steps = args.steps
    config.optim.mu_dtype = config.optim.nu_dtype = kind
    config.optim.rounding = "nearest" if kind == "float32" else "stochastic"
    config.mesh.num_devices = 1
    return configuration.parse(sft_config.Config, config)


def _losses(args: argparse.Namespace, kind: str) -> dict[str, list[float]]:
    """Return the loss of every step, by seed."""
    losses: dict[str, list[float]] = {}
    update = None
    for seed in range(args.seeds):
        options = _options(args, kind, seed)
        devices = devices_lib.open_devices(options.mesh, options.model)
        with tempfile.TemporaryDirectory() as folder, jax.set_mesh(devices.mesh):
            folder = pathlib.Path(folder)
            files = setup_models.keep_files(options.model, folder)
            model = setup_models.open_model(
                options.model, devices, files=files, is_discriminator=False
            )
            feed = sft_feed.Feed(options, devices, model, files=files, folder=folder)
            data = feed.train(args.steps, inputs=agreement.Inputs())
            optimizer = setup_models.make_optimizer(
                options.optim, model.params, num_steps=args.steps
            )
            key = jax.random.key(seed)
            start = setup_models.start_of(model, optimizer, devices, key=key)
            if update is None:  # seeds share the program
                loss_fn = sft_step.make_loss(options, devices)
                update = sft_step.make_update(options, devices, model, loss_fn, optimizer, start)
            state, logged = start.make(), []
            for number in range(args.steps):
                state, told = update(state, next(data), jax.random.fold_in(key, number))
                logged.append(metrics.read(told)["loss/nll"])
        losses[str(seed)] = [round(float(loss), 5) for loss in logged]
        print(f"{kind} seed {seed}: {losses[str(seed)][-1]}", file=sys.stderr, flush=True)
    return losses


def record(args: argparse.Namespace, raw: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return the record."""
    ends = {
        kind: np.array([np.mean(losses[-_LAST:]) for losses in of_seeds.values()])
        for kind, of_seeds in raw.items()
    }
    exact = ends["float32"]
    ratios = {
        f"{kind}: mean loss of the last {_LAST} steps over float32's": records.ratio(
            round(float((ends[kind] / exact).mean()), 4), "<= 1.01"
        )
        for kind in _KINDS[1:]
    }
    largest = {kind: round(float(np.abs(ends[kind] / exact - 1).max()), 5) for kind in _KINDS[1:]}
    return records.make(
        "moments",
        f"SFT of a tiny model with moments of few bits ends where float32 does, {args.seeds} "
        f"seeds, {args.steps} steps",
        ratios,
        limit=f"largest deviation of a seed {largest}; between seeds float32's losses deviate by "
        f"{exact.std() / exact.mean():.4f} (std over mean). A tiny model on a CPU.",
        raw=raw,
        module="benchmarks.moments",
    )


def main() -> None:
    """Train, print and keep the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, required=True, help="of `data numerals`")
    parser.add_argument("--tokenizer", type=pathlib.Path, default="launch/demo_base")
    parser.add_argument("--row_tokens", type=int, default=352)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    records.emit(record(args, {kind: _losses(args, kind) for kind in _KINDS}), args.out)


if __name__ == "__main__":
    main()
