"""Time the update of supervised fine-tuning with random weights, to see where its time goes.

    python -m benchmarks.train_step --size=small --profile --out=FILE.json   (one GPU)
    python -m benchmarks.train_step --size=4b --layers=12 --variants untuned_no_triton
    python -m benchmarks.train_step --size=tiny --variants default forward   (CPU)

Each variant is reported on standard error when it is done; none is begun after `--limit_seconds`.
The first four change how XLA compiles, the others what is computed, compiled as `--ablate` says:
so that they differ in one thing, and are not tuned for minutes each.

  default            XLA's own options
  no_triton          matmuls by cuBLAS alone
  untuned            nothing is tried out while compiling
  untuned_no_triton  both
  xla_attention      masked softmax instead of cuDNN
  recompute_head     the head's logits computed again in the backward pass
  remat_full         decoder layers and vision blocks computed again in the backward pass
  remat_attention    the same, but what attention made is kept
  no_vision          rows without pictures
  no_deepstack       pictures at the first layer alone
  no_optimizer       loss and gradients
  no_head            gradients of a sum of hidden states
  forward            the loss alone
  forward_no_head    hidden states alone

Needs the packages of models/ and prism_jax/training/train_step.py: JAX, Flax, NumPy, Optax and
jaxtyping.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_times, train_cases, train_variants
from prism_jax import batches

# Source: NVIDIA's data sheet of the H100 SXM, dense bfloat16.
_RATED_TERAFLOPS = 989.0
_TOP_KERNELS = 30
GROUPS = (
    ("attention", r"cudnn|fmha|flash|sdpa"),
    ("matmul", r"gemm|nvjet|cutlass|cublas|splitk|wgmma|_dot"),
    ("scatter", r"scatter"),
    ("copy and fill", r"copy|memset|memcpy|transpose|concatenate|dynamic_update_slice"),
    ("reduction", r"reduce|softmax|triton"),
    ("elementwise", r"fusion|fused|wrapped"),
)
# What matters most first: the limit may cut the list.
_USUAL = (
    *("untuned_no_triton", "forward", "no_optimizer", "no_deepstack", "no_vision", "untuned"),
    *("no_triton", "default", "forward_no_head", "no_head", "xla_attention", "remat_attention"),
)


class Clock:
    """Run one compiled program, which may consume its state, and time it."""

    def __init__(
        self,
        compiled: jax.stages.Compiled,
        case: train_variants.Case,
        state: train_variants.State,
        batch: batches.SFTBatch,
    ):
        self._compiled, self._is_update = compiled, case.program == "update"
        self._batch, self._key = batch, jax.random.key(1)
        self.state = state

    def run(self, num_steps: int) -> Any:
        """Queue so many steps and wait for the last."""
        for _ in range(num_steps):
            out = self._compiled(self.state, self._batch, self._key)
            if self._is_update:
                self.state = out[0]
        return jax.block_until_ready(out)

    def seconds(self, num_steps: int) -> float:
        """Return the seconds a step of so many in a row."""
        begun = time.perf_counter()
        self.run(num_steps)
        return (time.perf_counter() - begun) / num_steps


def matmul_teraflops(side: int) -> float:
    """Return the speed of a square bfloat16 matmul, the median of five times ten queued ones."""
    x = jnp.full((side, side), 0.01, jnp.bfloat16)
    run = jax.jit(lambda x: x @ x)
    jax.block_until_ready(run(x))
    rates = []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(10):
            y = run(x)
        y.block_until_ready()
        rates.append(20 * side**3 / (time.perf_counter() - begun) / 1e12)
    return float(np.median(rates))


def measure(
    variant: str,
    case: train_variants.Case,
    clock: Clock,
    batch: batches.SFTBatch,
    *,
    compiled: jax.stages.Compiled,
) -> dict:
    """Time a compiled variant: five groups of steps behind one that warms up."""
    first = clock.seconds(1)
    warm = clock.seconds(1)
    num_steps = int(np.clip(0.5 / warm, 1, 10))
    times = [clock.seconds(num_steps) for _ in range(5)]
    seconds = float(np.median(times))
    by_part = train_cases.flops(case.size, batch, has_backward=case.program != "loss")
    if case.head is None:
        by_part["all"] -= by_part.pop("head")
    memory = compiled.memory_analysis()
    rate = by_part["all"] / seconds / 1e12
    return {
        "variant": variant,
        "program": case.program,
        "attention": case.implementation,
        "remat": case.size.remat,
        "head": case.head,
        "options": case.options,
        "milliseconds_a_step": seconds * 1e3,
        "milliseconds_by_group": [t * 1e3 for t in times],
        "steps_a_group": num_steps,
        "first_step_seconds": first,
        "tokens_per_second": train_cases.num_tokens(batch) / seconds,
        "teraflops_a_step": {part: count / 1e12 for part, count in by_part.items()},
        "teraflops_per_second": rate,
        f"of_{_RATED_TERAFLOPS:.0f}_teraflops": rate / _RATED_TERAFLOPS,
        "temporary_gigabytes": memory.temp_size_in_bytes / 1e9,
        "argument_gigabytes": memory.argument_size_in_bytes / 1e9,
    }


def profile(clock: Clock, compiled: jax.stages.Compiled) -> dict:
    """Trace two warm steps kernel by kernel."""
    seconds, events = kernel_times.trace(lambda: clock.run(2))
    return {"milliseconds_a_step_traced": seconds * 1e3 / 2} | kernel_times.summarize(
        events,
        2,
        groups=GROUPS,
        num_kernels=_TOP_KERNELS,
        origins=kernel_times.sources(compiled.as_text()),
    )


def build(
    case: train_variants.Case, batch: batches.SFTBatch
) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """Compile one variant and tell how long that took."""
    begun = time.perf_counter()
    program, _, abstract = train_variants.program_of(case)
    lowered = program.lower(abstract, batch, jax.random.key(1))
    traced = time.perf_counter()
    compiled = lowered.compile()
    return compiled, {
        "trace_seconds": traced - begun,
        "compile_seconds": time.perf_counter() - traced,
    }


class Bench:
    """Compile the variants, several at a time, and time them one by one."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._size = train_cases.with_layers(train_cases.SIZES[args.size], args.layers)
        self._dtype = jnp.dtype(args.dtype)
        self._host = train_cases.make_batch(self._size)
        self._batch = jax.device_put(self._host)
        self._state = None
        self._begun = time.perf_counter()

    def about(self) -> dict:
        """Return the measurements."""
        size = self._size
        return {
            "size": self._args.size,
            "text_layers": size.config.text.num_layers,
            "dtype": self._dtype.name,
            "rows": size.rows,
            "row_tokens": size.row_tokens,
            "row_patches": size.row_patches,
            "tokens": train_cases.num_tokens(self._host),
            "frozen": size.frozen,
        }

    def case(self, variant: str) -> train_variants.Case:
        """Return the variant of a name; that of the profile has no command buffers."""
        case = train_variants.case_of(
            variant, self._size, ablate=self._args.ablate, dtype=self._dtype
        )
        if variant != "profile" or jax.default_backend() != "gpu":
            return case
        return dataclasses.replace(case, options=case.options | kernel_times.NO_COMMAND_BUFFERS)

    def batch(self, variant: str, batch: batches.SFTBatch) -> batches.SFTBatch:
        """Return the rows of a variant."""
        return dataclasses.replace(batch, vision=None) if variant == "no_vision" else batch

    def time(self, variant: str, make: Callable[[], tuple]) -> dict:
        """Measure and report one variant; one that cannot run says why."""
        case = self.case(variant)
        try:
            compiled, description = make()
            if self._state is None:
                self._state = train_variants.make_state(case, train_variants.program_of(case)[1])
            clock = Clock(compiled, case, self._state, self.batch(variant, self._batch))
            self._state = None
            host = self.batch(variant, self._host)
            result = measure(variant, case, clock, host, compiled=compiled) | description
            if variant == "profile":
                result["profile"] = profile(clock, compiled)
                if self._args.hlo is not None:
                    self._args.hlo.write_text(compiled.as_text())
            self._state = clock.state
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            result = {"variant": variant, "error": str(error)[:500]}
        kernel_times.report(result)
        return result

    def run(self, variants: Sequence[str]) -> list[dict]:
        """Time variants in order, those that are tuned while compiling last and alone.

        While one is timed others may be compiled on other cores: `compiling_beside` says how many.
        """
        builds = {
            variant: functools.partial(build, self.case(variant), self.batch(variant, self._batch))
            for variant in variants
        }
        is_tuned = {v: "xla_gpu_autotune_level" not in self.case(v).options for v in variants}
        untuned = [v for v in variants if not is_tuned[v]]
        results = []
        with concurrent.futures.ThreadPoolExecutor(self._args.compile_threads) as pool:
            futures = {variant: pool.submit(builds[variant]) for variant in untuned}
            for variant, future in futures.items():
                if self._is_late(variant):
                    future.cancel()
                    continue
                concurrent.futures.wait([future])
                beside = sum(not other.done() for other in futures.values())
                results.append(self.time(variant, future.result) | {"compiling_beside": beside})
        for variant in variants:
            if is_tuned[variant] and not self._is_late(variant):
                results.append(self.time(variant, builds[variant]))
        return results

    def _is_late(self, variant: str) -> bool:
        is_late = time.perf_counter() - self._begun > self._args.limit_seconds
        if is_late:
            kernel_times.say(f"{variant}: not begun, --limit_seconds is over")
        return is_late


def run(args: argparse.Namespace) -> dict:
    """Measure what was asked for."""
    bench = Bench(args)
    device = jax.devices()[0]
    result = {"device": device.device_kind, "jax": jax.__version__} | bench.about()
    result["matmul_teraflops_per_second"] = matmul_teraflops(256 if args.size == "tiny" else 8192)
    kernel_times.report(result)
    results = bench.run([*(["profile"] if args.profile else []), *args.variants])
    for one in results:
        if "teraflops_per_second" in one:
            rate = one["teraflops_per_second"]
            one["of_matmul"] = rate / result["matmul_teraflops_per_second"]
    # The CPU has no such figures.
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return result | {"peak_gigabytes": None if peak is None else peak / 1e9, "results": results}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--size", choices=list(train_cases.SIZES), default="small")
    add("--layers", type=int, help="of text, fewer than the model has")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add(
        "--variants",
        nargs="*",
        choices=(*train_variants.OPTIONS, *train_variants.ABLATIONS),
        default=_USUAL,
    )
    add("--ablate", choices=list(train_variants.OPTIONS), default="untuned_no_triton")
    add("--profile", action="store_true", help="and list the kernels of the update")
    add("--hlo", type=pathlib.Path, help="with --profile: write the compiled program there")
    add("--compile_threads", type=int, default=4)
    add("--limit_seconds", type=float, default=120.0)
    add("--out", type=pathlib.Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the result."""
    args = parse(arguments)
    text = json.dumps(run(args), indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
