"""Record the memory of a step on a long row, the row split over all chips and a row on each.

    python -m benchmarks.sequence --out=benchmarks/results/sequence_32k.json

The step is supervised fine-tuning with AdamW, float32 weights and moments, full remat, splash
attention, compiled ahead of time for a described TPU topology (see `benchmarks.tpu_compile`):
nothing is executed. `mesh.axes.sequence` takes all chips in one case, `mesh.axes.fsdp` in the
other; weights and moments are spread over all of them in both.
"""

import argparse
import pathlib
import sys
from typing import Any

import jax

from benchmarks import records, tpu_compile, tpu_programs

_MESHES = {"split": "sequence=-1", "whole": "fsdp=-1"}


def compiled(args: argparse.Namespace, mesh: str) -> dict[str, Any]:
    """Return what `benchmarks.tpu_compile` reports of the step on this mesh."""
    case = tpu_programs.Case(
        model=args.model,
        topology=args.topology,
        program="train",
        mesh=mesh,
        row_tokens=args.row_tokens,
        row_patches=args.row_patches,
        rows=1,
        chunk_tokens=args.chunk_tokens,
        moe_implementation=None,
    )
    print(f"compiling {args.model} for {args.topology}, {mesh}", file=sys.stderr, flush=True)
    return tpu_compile.measure(case, None)


def record(args: argparse.Namespace, raw: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the record of both compilations."""
    split, whole = raw["split"], raw["whole"]
    share = None
    if "total_gib" in split and "total_gib" in whole:
        share = round(split["temporary_gib"] / whole["temporary_gib"], 3)
    ratios = {
        "the split row fits": records.ratio(split["verdict"] == "fits", "yes"),
        "temporaries, split over whole": records.ratio(share, "<= 0.5"),
    }
    return records.make(
        "sequence_32k",
        f"A step of {args.model} SFT on a row of {args.row_tokens} tokens and {args.row_patches} "
        f"patches split over the chips of {args.topology}, beside a whole row on each chip",
        ratios,
        limit="compiled ahead of time, not run. Gathered weights, the gradients of the chip's part "
        "and keys and values of whole rows do not shrink with the row's part.",
        raw=raw,
        module="benchmarks.sequence",
        device=f"{args.topology}, described; compiled on a CPU",
    )


def main(arguments: list[str] | None = None) -> None:
    """Compile, print and keep the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(tpu_programs.MODELS), default="8b")
    parser.add_argument("--topology", default="v5p:2x2x2")
    parser.add_argument("--row_tokens", type=int, default=32_768)
    parser.add_argument("--row_patches", type=int, default=32_768)
    parser.add_argument("--chunk_tokens", type=int, default=1024, help="per chip, through the head")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    made = record(args, {name: compiled(args, mesh) for name, mesh in _MESHES.items()})
    records.emit(made, args.out)


if __name__ == "__main__":
    main()
