"""Time a chunk of decoding in variants, and list its kernels; random weights, one GPU.

    python -m benchmarks.decode_variants --size=4b --out=FILE.json
    python -m benchmarks.decode_variants --size=tiny --seconds=60                 (CPU)

All programs are compiled side by side, then timed one after another, the most telling first, until
`--seconds` are over; results are printed and written as they come.

  shape    slots       prompts  tokens of a prompt, of a response
  64       64          4        324, 145
  256      256         16       324, 145
  48       48          48       2000, 500
  ragged   80 + 16     6        324, log-normal, two thirds of the slots in use
  tail     16          1        324, up to 8000, a quarter of the slots in use

  variant      what differs
  base         nothing; traced kernel by kernel
  heads        a response's query heads go to cuDNN as heads of one query each
  pdl          XLA option `xla_gpu_enable_pdl`
  concurrent   XLA option `xla_gpu_command_buffer_scheduling_mode=CONCURRENT`
  alone        each slot holds its prompt itself
  block_N      blocks of N places
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import time
import traceback
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_times, rollout_cases, sizes
from models.cache import Cache
from prism_jax.rollout import decode, memory
from prism_jax.rollout.sampling import Mode, Settings

_CHUNK = 32
_OPTIONS = {
    "pdl": {"xla_gpu_enable_pdl": True, "xla_gpu_enable_pdl_launch": True},
    "concurrent": {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"},
}
_GROUPS = (
    ("attention", r"cudnn|fmha|flash|sdpa"),
    ("matmul", r"gemm|nvjet|cutlass|cublas|splitk|wgmma|_dot"),
    ("cache write", r"scatter"),
    ("copy and fill", r"copy|memset|memcpy"),
    ("other", r"."),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Slots and how full they are."""

    classes: tuple[tuple[int, int], ...]
    num_prompts: int
    prompt_tokens: int
    counts: np.ndarray  # tokens of each response; -1: the slot is empty
    block: int

    def plan(self, block: int, *, alone: bool) -> memory.Plan:
        """Return the sampler's memory."""
        prompt_places = memory.round_up(self.prompt_tokens, 64)
        prompt_blocks = -(-prompt_places // 1024)
        prompt_places = prompt_blocks * memory.round_up(-(-prompt_places // prompt_blocks), 64)
        more = memory.round_up(self.prompt_tokens, block) if alone else 0
        return memory.Plan(
            num_parts=1,
            classes=tuple((rows, places + more) for rows, places in self.classes),
            block_places=block,
            num_prompts=1 if alone else self.num_prompts,
            prompt_places=64 if alone else prompt_places,
            prompt_block_places=64 if alone else prompt_places // prompt_blocks,
            width=1 if alone else -(-len(self.counts) // self.num_prompts),
            prefill_prompts=1,
        )


def shapes(is_tiny: bool) -> dict[str, Shape]:
    """Return the shapes by name."""
    rng = np.random.default_rng(0)

    def full(count: int, tokens: int) -> np.ndarray:
        return np.full(count, tokens)

    # In flight: a length that was drawn in proportion to itself, at a random place.
    lengths = np.clip(rng.lognormal(np.log(1550) + 0.26, 0.72, 64), 40, 8100)
    inside = np.sort((lengths * rng.uniform(0, 1, 64)).astype(int))
    short, long = inside[inside < 1900], inside[inside >= 1900][-16:]
    ragged = np.concatenate([short, full(80 - len(short), -1), long, full(16 - len(long), -1)])
    tail = np.concatenate([[7900, 6000, 4000, 2500], full(12, -1)])
    values = {
        "64": (((64, 256),), 4, 324, full(64, 145), 256),
        "48": (((48, 1024),), 48, 2000, full(48, 500), 1024),
        "ragged": (((80, 2048), (16, 8192)), 6, 324, ragged, 1024),
        "256": (((256, 256),), 16, 324, full(256, 145), 256),
        "tail": (((16, 8192),), 1, 324, tail, 1024),
    }
    if is_tiny:
        values = {
            "64": (((4, 256),), 2, 20, full(4, 145), 256),
            "ragged": (((3, 256), (2, 1024)), 1, 20, np.array([3, 100, -1, 900, -1]), 256),
        }
    names = ("classes", "num_prompts", "prompt_tokens", "counts", "block")
    return {name: Shape(**dict(zip(names, values, strict=True))) for name, values in values.items()}


# The most telling first.
_RUNS = (
    ("64", "base"),
    ("48", "base"),
    ("ragged", "base"),
    ("64", "heads"),
    ("48", "heads"),
    ("48", "alone"),
    ("64", "pdl"),
    ("64", "concurrent"),
    ("ragged", "block_2048"),
    ("tail", "base"),
    ("tail", "block_8192"),
    ("256", "base"),
    ("ragged", "heads"),
)


def _control(shape: Shape, plan: memory.Plan) -> decode.Control:
    slots, each = len(shape.counts), plan.width
    numbers = np.arange(slots)
    readers = np.full(plan.num_prompts * each, -1, np.int32)
    places = min(slots, len(readers))
    readers[:places] = numbers[:places]
    return decode.Control(
        is_open=shape.counts >= 0,
        is_fresh=np.zeros(slots, bool),
        prompt=np.minimum(numbers // each, plan.num_prompts - 1).astype(np.int32),
        place=(numbers % each).astype(np.int32),
        starts=np.full(slots, shape.prompt_tokens, np.int32),
        limits=np.full(slots, 1 << 20, np.int32),
        ends=np.full((slots, 1), -1, np.int32),
        keys=np.zeros((slots, 2), np.uint32),
        numbers=numbers.astype(np.uint32),
        settings=Settings(
            temperature=np.ones(slots, np.float32),
            top_k=np.zeros(slots, np.int32),
            top_p=np.ones(slots, np.float32),
        ),
        prompt_lengths=np.full(plan.num_prompts, min(shape.prompt_tokens, plan.prompt_places)),
        readers=readers.reshape(plan.num_prompts, each),
    )


def _alone(state: Any, control: Any, is_running: Any, layout: Any) -> Cache:
    """Return the cache of slots that hold their prompts."""
    return Cache(
        keys=state.keys,
        values=state.values,
        layout=layout,
        lengths=state.counts,
        next_positions=state.counts,
        is_running=is_running,
        prompts=None,
    )


class Run:
    """A variant at a shape: its program, state and figures."""

    def __init__(self, sampler: rollout_cases.Sampler, name: str, shape: Shape, variant: str):
        self.name, self.shape, self.variant, self.sampler = name, shape, variant, sampler
        block = int(variant[6:]) if variant.startswith("block_") else shape.block
        self.plan = shape.plan(block, alone=variant == "alone")
        self.control = jax.tree.map(jnp.asarray, _control(shape, self.plan))

    def lower(self) -> Any:
        """Return the lowered chunk."""
        engine = self.sampler.engine
        program = decode.Program(
            mode=Mode(has_noise=True, top_k=None, has_top_p=False),
            layout=self.plan.layout(),
            implementation=engine.decode_implementation,
            chunk_tokens=_CHUNK,
            key_impl="threefry2x32",
            rules=engine.rules,
        )
        run = functools.partial(decode.run_chunk, engine.graphdef, program=program)
        state = decode.abstract_state(engine.config.text, self.plan, jnp.bfloat16)
        with _patched(self.variant), jax.set_mesh(engine.mesh):
            return jax.jit(run, donate_argnums=1).lower(self.sampler.params, state, self.control)

    def compile(self, lowered: Any) -> Any:
        """Return the compiled chunk."""
        options = decode.compiler_options(jax.default_backend())
        return lowered.compile(options | _OPTIONS.get(self.variant, {}))

    def _counts(self) -> jax.Array:
        more = self.shape.prompt_tokens if self.variant == "alone" else 0
        return jnp.asarray(np.maximum(self.shape.counts, 0) + more, jnp.int32)

    def _state(self) -> decode.State:
        text = self.sampler.engine.config.text
        shapes = decode.abstract_state(text, self.plan, jnp.bfloat16)
        keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
        make = functools.cache(
            lambda shape: jax.jit(lambda key: 0.3 * jax.random.normal(key, shape, jnp.bfloat16))
        )
        state = jax.tree.map(lambda leaf: make(leaf.shape)(next(keys)), shapes)
        return dataclasses.replace(state, counts=self._counts())

    def needed_bytes(self) -> float:
        """Return the bytes that a step must read, in the middle of the chunk."""
        text = self.sampler.engine.config.text
        place = 4 * text.num_layers * text.num_kv_heads * text.head_dim
        counts = self.shape.counts[self.shape.counts >= 0]
        prompts = len(np.unique(np.flatnonzero(self.shape.counts >= 0) // max(1, self.plan.width)))
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self.sampler.params["text"]))
        places = (counts + (1 + _CHUNK) / 2).sum() + prompts * self.shape.prompt_tokens
        return weights + place * places

    def measure(self, compiled: Any, rate: float) -> dict:
        """Time chunks of the same steps."""
        state, seconds = self._state(), []

        def chunk() -> Any:
            nonlocal state
            counts = self._counts()
            state = dataclasses.replace(state, counts=jax.block_until_ready(counts))
            state, result = compiled(self.sampler.params, state, self.control)
            return result.num_steps

        for _ in range(4):
            jax.block_until_ready(state)
            begun = time.perf_counter()
            steps = int(chunk())
            seconds.append((time.perf_counter() - begun) / steps)
        median, needed = float(np.median(seconds[1:])), self.needed_bytes()
        figures = {
            "shape": self.name,
            "variant": self.variant,
            "milliseconds_a_step": 1e3 * median,
            "all_milliseconds": [1e3 * one for one in seconds],
            "needed_gigabytes_a_step": needed / 1e9,
            "of_copy": needed / rate / median,
        }
        if self.variant == "base":
            begun = time.perf_counter()
            _, events = kernel_times.trace(chunk)
            figures["kernels"] = kernel_times.summarize(
                events, steps, groups=_GROUPS, num_kernels=24
            )
            figures["trace_seconds"] = time.perf_counter() - begun
        return figures


def _patched(variant: str) -> Any:
    if variant == "alone":
        return mock.patch.object(decode, "_cache", _alone)
    most = 8 if variant == "heads" else 0
    return mock.patch("models.cudnn_attention._MOST_GROUPED", most)


def _tell(figures: dict) -> None:
    kernels = figures.get("kernels")
    kernel_times.report({k: v for k, v in figures.items() if k != "kernels"})
    if kernels is None:
        return
    steps = kernels["steps"]
    kernel_times.say(
        f"  busy {kernels['busy_microseconds_a_step']:.0f} us a step, "
        f"{kernels['kernels_a_step']:.1f} kernels; "
        + json.dumps({k: round(v) for k, v in kernels["groups_microseconds_a_step"].items()})
    )
    for one in kernels["kernels"]:
        count = one["count"] / steps
        each = one["total_microseconds"] / steps
        kernel_times.say(f"  {each:8.1f} us {count:7.1f} x {each / count:6.1f}  {one['name'][:90]}")


def main() -> None:
    """Compile, time and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=list(sizes.SIZES), default="4b")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--only", nargs="*", help="SHAPE/VARIANT, all without")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    begun = time.perf_counter()
    is_tiny, results = args.size == "tiny", []

    def clock() -> str:
        return f"[{time.perf_counter() - begun:6.1f} s]"

    def failed(name: str) -> None:
        kernel_times.say(f"{clock()} {name} failed: {traceback.format_exc()[-1500:]}")

    sampler = rollout_cases.random_sampler(
        sizes.SIZES[args.size], jax.devices()[:1], chunk_tokens=_CHUNK, tensor=1
    )
    rate = rollout_cases.copy_rate(0.02 if is_tiny else 2.0)
    kernel_times.say(f"{clock()} weights made, copy {rate / 1e12:.3f} TB/s")
    known, waiting = shapes(is_tiny), []
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for name, variant in _RUNS:
            label = f"{name}/{variant}"
            if name not in known or (args.only and label not in args.only):
                continue
            try:
                run = Run(sampler, name, known[name], variant)
                waiting.append((label, run, pool.submit(run.compile, run.lower())))
            except Exception:
                failed(label)
            kernel_times.say(f"{clock()} {label} lowered")
        concurrent.futures.wait([future for _, _, future in waiting])
    kernel_times.say(f"{clock()} {len(waiting)} programs compiled")
    for label, run, future in waiting:
        if time.perf_counter() - begun > args.seconds:
            kernel_times.say(f"{clock()} {label} left out: time is over")
            continue
        try:
            results.append(run.measure(future.result(), rate))
            _tell(results[-1])
        except Exception:
            failed(label)
        if args.out is not None:
            device = jax.devices()[0].device_kind
            args.out.write_text(
                json.dumps({"device": device, "copy": rate, "results": results}, indent=1) + "\n"
            )
    kernel_times.say(f"{clock()} done")


if __name__ == "__main__":
    main()
