"""Time the step of the record `train_sft` under compiler options and remat policies.

    python -m benchmarks.train_options --out=FOLDER                       (one H100, 5 minutes)
    python -m benchmarks.train_options --size=tiny --out=FOLDER           (any machine, to try it)

Each variant is printed and written when it is done; none is begun after `--limit_seconds`. Then
the fastest with bf16 states is traced kernel by kernel. Compiled programs are kept in the folder.

  dots               XLA's own options
  dots_plain         matmuls neither read nor write slices of stacks themselves: where the result is
                     needed as well as kept, they are else computed twice
  dots_unrolled      the layers one after the other instead of a scan: nothing is stacked
  float32            float32 weights and moments, what attention made is kept
  dots_cublas        as dots_plain, all matmuls by cuBLAS
  unrolled_cublas    as dots_unrolled, all matmuls by cuBLAS
  float32_full       as float32, whole layers are recomputed
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Iterator
from typing import Any

# Set before JAX starts: the largest runs need nearly the whole card.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.97")

import jax

from benchmarks import kernel_times, train_cases, train_runs, train_step

_WIDE = train_runs.NO_TRITON | train_runs.PLAIN | train_runs.NO_REMAT
_DOTS = {"states": "bfloat16", "remat": "save_attention_and_dots"}
VARIANTS: dict[str, dict[str, Any]] = {
    "dots": {**_DOTS, "options": {}},
    "dots_plain": {**_DOTS, "options": train_runs.PLAIN | train_runs.NO_REMAT},
    "dots_unrolled": {**_DOTS, "options": train_runs.NO_REMAT},
    "float32": {"states": "float32", "remat": "save_attention", "options": _WIDE},
    "dots_cublas": {**_DOTS, "options": _WIDE},
    "unrolled_cublas": {**_DOTS, "options": train_runs.NO_TRITON | train_runs.NO_REMAT},
    "float32_full": {"states": "float32", "remat": "full", "options": _WIDE},
}
_KERNELS = 60


@contextlib.contextmanager
def _layers(name: str, num_layers: int) -> Iterator[None]:
    """Let scans over so many layers be unrolled where the variant is named so."""
    scan = jax.lax.scan

    def unrolled(f, init, xs=None, length=None, **how):
        if jax.tree.leaves(xs)[0].shape[0] == num_layers:
            how["unroll"] = num_layers
        return scan(f, init, xs, length, **how)

    try:
        jax.lax.scan = unrolled if "unrolled" in name else scan
        yield
    finally:
        jax.lax.scan = scan


def _keep_program(
    path: pathlib.Path, name: str, compiled: jax.stages.Compiled, run: Any
) -> dict[str, Any]:
    del run
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{name}.hlo", compiled.as_text())
    return {}


def _trace(compiled: jax.stages.Compiled, run: Any) -> dict[str, Any]:
    """Trace two warm steps."""
    del compiled
    seconds, events = kernel_times.trace(lambda: [run() for _ in range(2)])
    return {"milliseconds_a_step_traced": seconds * 1e3 / 2} | kernel_times.summarize(
        events,
        2,
        groups=train_step.GROUPS,
        num_kernels=_KERNELS,
    )


def run(args: argparse.Namespace) -> dict[str, dict]:
    """Measure what was asked for, in order."""
    begun = time.perf_counter()
    num_layers = train_cases.SIZES[args.size].config.text.num_layers
    rate = train_step.matmul_teraflops(256 if args.size == "tiny" else 8192)
    results: dict[str, dict] = {"matmul": {"teraflops": rate}}

    def measure(name: str, variant: dict[str, Any], observe: Any) -> None:
        seconds = time.perf_counter() - begun
        if seconds > args.limit_seconds:
            kernel_times.say(f"{name}: not begun, --limit_seconds is over")
            return
        with _layers(name, num_layers):
            one = train_runs.sft(args.size, **variant, observe=observe)
        if "tokens_per_second" in one:
            flops = 6 * one["matmul_parameters"] * one["tokens_per_second"]
            one["of_matmul"] = flops / 1e12 / rate
        results[name] = {"variant": name, "begun_at": seconds} | one
        kernel_times.report(results[name])
        (args.out / "train_options.json").write_text(json.dumps(results, indent=1) + "\n")

    for name in args.variants:
        path = args.out / "programs.zip"
        measure(name, VARIANTS[name], functools.partial(_keep_program, path, name))
    speeds = {
        name: one["tokens_per_second"]
        for name, one in results.items()
        if one.get("states") == "bfloat16" and "tokens_per_second" in one
    }
    if speeds:
        best = max(speeds, key=speeds.__getitem__)
        variant = dict(VARIANTS[best])
        if jax.default_backend() == "gpu":
            variant["options"] = variant["options"] | kernel_times.NO_COMMAND_BUFFERS
        measure(f"{best}_traced", variant, _trace)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("tiny", "2b", "4b"), default="4b")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--limit_seconds", type=float, default=270.0)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for one in run(args).values():
        for kernel in one.get("kernels", ()):
            per_step = kernel["total_microseconds"] / one["steps"]
            count = kernel["count"] / one["steps"]
            print(f"{per_step:10.0f} us {count:7.1f} x {kernel['name']}")


if __name__ == "__main__":
    main()
