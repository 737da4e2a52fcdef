"""Compile the models' programs for TPU topologies ahead of time and record what memory they need.

No TPU is needed: libtpu (the extra `tpu`) compiles for a described topology on any Linux machine.
Nothing is executed. Example:

  python -m benchmarks.tpu_compile --model 4b --topology v5e:4x4 v6e:2x4 --program gradient \\
      --row_tokens 8192 --row_patches 4096 --out benchmarks/results/tpu_compile.json

Every combination of the models, topologies and programs is compiled in turn; each prints one line
of JSON to standard output, and replaces its older entry in `--out`. How to read the figures:
docs/tpu_memory.md.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import math
import pathlib
import re
import resource
import sys
import time
from typing import Any

import jax

from benchmarks import tpu_programs

# GiB of one chip that the compiler of libtpu 0.0.42.1 lets a program use.
HBM_GIB = {"v5e": 15.75, "v6e": 31.25, "v5p": 95.74, "tpu7x": 94.75}
# A running job also holds what the program does not: the next batch, fragmentation.
SAFE_FRACTION = 0.90

_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_ARRAY = re.compile(r"(pred|bf16|[fsu]\d+)\[([\d,]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def largest_array(shape: str) -> tuple[int, str]:
    """Return bytes (without padding) and type of the largest array in an HLO shape."""
    sizes = [(0, "")]
    for dtype, dims in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(dtype.lstrip("bfsu"))
        count = math.prod(int(d) for d in dims.split(",") if d)
        sizes.append((count * bits // 8, f"{dtype}[{dims}]"))
    return max(sizes)


def collectives(hlo: str) -> list[dict[str, Any]]:
    """Return the collective operations of a compiled program, the largest first.

    Equal ones are counted together. One inside a loop runs once a turn but stands here once; of a
    combined one the largest array stands for all.
    """
    counts = collections.Counter()
    is_fused = False
    for line in hlo.splitlines():
        if line.startswith("%"):
            # A TPU's reduce-scatter is a computation of this name that holds an all-reduce.
            is_fused = line.startswith("%all-reduce-scatter")
        match = _COLLECTIVE.search(line)
        if match is not None:
            kind = "reduce-scatter" if is_fused else match[2]
            name = _OP_NAME.search(line)
            counts[*largest_array(match[1]), kind, name[1] if name else ""] += 1
    fields = ("bytes", "array", "kind", "op_name", "count")
    ordered = sorted(counts.items(), key=lambda item: (-item[0][0], item[0]))
    return [dict(zip(fields, (*key, count), strict=True)) for key, count in ordered]


def memory(compiled: jax.stages.Compiled, topology: str) -> dict[str, Any]:
    """Return GiB per chip, and whether they fit."""
    stats = compiled.memory_analysis()
    hbm = HBM_GIB[topology.split(":", maxsplit=1)[0]]
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporary": stats.temp_size_in_bytes,
        "peak_reported": stats.peak_memory_in_bytes,
    }
    gib = {name: size / 2**30 for name, size in sizes.items()}
    gib["total"] = gib["arguments"] + gib["outputs"] - gib["aliased"] + gib["temporary"]
    verdict = "fits" if gib["total"] <= SAFE_FRACTION * hbm else "compiles, no safe margin"
    rounded = {f"{name}_gib": round(size, 3) for name, size in gib.items()}
    return rounded | {"hbm_gib": hbm, "verdict": verdict}


def measure(case: tpu_programs.Case, hlo_path: pathlib.Path | None) -> dict[str, Any]:
    """Compile one case; a program that does not fit is a result, not an error."""
    mesh = tpu_programs.topology_mesh(case.topology, case.mesh)
    function, arguments = tpu_programs.program(case, mesh)
    result = dataclasses.asdict(case) | {"jax": jax.__version__}
    start = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = function.lower(*arguments)
        result["lower_seconds"] = round(time.monotonic() - start, 1)
        start = time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled, result["error"] = None, str(error).splitlines()[0][:400]
    result["compile_seconds"] = round(time.monotonic() - start, 1)
    # Linux counts ru_maxrss in KiB. It is the most that this process ever held.
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["host_gib"] = round(host / 2**20, 2)
    if compiled is None:
        return result | {"verdict": "does not fit"}
    hlo = compiled.as_text()
    if hlo_path is not None:
        hlo_path.write_text(hlo)
    result["pallas_kernels"] = hlo.count('custom_call_target="tpu_custom_call"')
    result["largest_collectives"] = collectives(hlo)[:6]
    return result | memory(compiled, case.topology)


def store(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Put a result into the table, in place of an older one of the same case."""
    table = json.loads(path.read_text()) if path.exists() else []
    names = [field.name for field in dataclasses.fields(tpu_programs.Case)]
    table = [old for old in table if any(old.get(n) != result[n] for n in names)]
    table = sorted([*table, result], key=lambda r: [str(r[n]) for n in names])
    path.write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = tpu_programs.MODELS
    parser.add_argument("--model", nargs="+", choices=models, required=True)
    parser.add_argument("--topology", nargs="+", required=True, help="v5e:4x4 v5p:2x2x1 v6e:2x4")
    parser.add_argument("--program", nargs="+", choices=tpu_programs.PROGRAMS, required=True)
    parser.add_argument("--mesh", default="fsdp=-1", help="e.g. data=-1,tensor=2; others are 1")
    parser.add_argument("--row_tokens", type=int, required=True)
    parser.add_argument("--row_patches", type=int, required=True)
    parser.add_argument("--chunk_tokens", type=int, default=1024, help="per chip, through the head")
    parser.add_argument("--rows", type=int, default=1, help="rows per shard of data and fsdp")
    parser.add_argument("--moe_implementation", choices=("dense", "ragged"), default="dense")
    parser.add_argument("--out", type=pathlib.Path, help="JSON table to update")
    parser.add_argument("--hlo", type=pathlib.Path, help="file for the compiled program's text")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    for model, topology, name in itertools.product(args.model, args.topology, args.program):
        case = tpu_programs.Case(
            model=model,
            topology=topology,
            program=name,
            mesh=args.mesh,
            row_tokens=args.row_tokens,
            row_patches=args.row_patches,
            rows=args.rows,
            chunk_tokens=args.chunk_tokens,
            moe_implementation=args.moe_implementation if models[model].text.moe else None,
        )
        print(f"compiling {model} {name} for {topology}", file=sys.stderr)
        result = measure(case, args.hlo)
        print(json.dumps(result), flush=True)
        if args.out is not None:
            store(args.out, result)


if __name__ == "__main__":
    main()
