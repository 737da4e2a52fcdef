"""Load a checkpoint that transformers wrote, compare logits with transformers', time decoding.

    python benchmarks/reference_checkpoint.py --size=4b --out=DIR      (torch)
    python benchmarks/load_and_compare.py --reference=DIR --out=FILE.json

The result says how far our bfloat16 logits are from transformers' float32 ones, beside how far
transformers' own bfloat16 logits are; how long loading took and how much host memory it needed;
and how fast 64 responses are decoded, against what reading weights and caches must take.
"""

import argparse
import json
import pathlib
import resource
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from models import inputs, qwen3_vl, sharding
from prism_jax.checkpoints import pretrained
from prism_jax.rollout import engine, serving
from prism_jax.rollout.sampling import Sampling
from prism_jax.setup import devices as devices_lib


class HostMemory:
    """Sample this process's own memory; file pages that the system could drop do not count."""

    def __init__(self):
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @staticmethod
    def now() -> int:
        """Return anonymous resident bytes."""
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("this system does not tell RssAnon")

    def _run(self) -> None:
        while not self._stop.is_set():
            self.peak_bytes = max(self.peak_bytes, self.now())
            time.sleep(0.005)

    def __enter__(self) -> "HostMemory":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def relative(values: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference over the norm."""
    values, expected = values.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def compare(model: pretrained.Pretrained, reference, implementation: str) -> dict:
    """Compare logits of the last places."""
    example = _example(reference)
    packed = {"config": model.config, "max_segments": 2, "num_vision_rows": 1}
    text = inputs.pack_text([[example]], row_tokens=384, **packed)
    vision = inputs.pack_vision([[example]], row_patches=1152, **packed)
    built = qwen3_vl.nnx.merge(model.graphdef, model.params)
    places = slice(len(example.tokens) - len(reference["float32"]), len(example.tokens))

    @jax.jit
    def run(built, text, vision):
        hidden, _ = built(text, vision, implementation=implementation, remat="none")
        return built.logits(hidden[0, places])

    logits = np.asarray(run(built, text, vision))
    wide, narrow = reference["float32"], reference["bfloat16"]
    best = wide.argmax(-1)
    return {
        "attention": implementation,
        "ours_to_transformers_float32": relative(logits, wide),
        "transformers_bfloat16_to_float32": relative(narrow, wide),
        "ours_to_transformers_bfloat16": relative(logits, narrow),
        "same_best_token_ours": float((logits.argmax(-1) == best).mean()),
        "same_best_token_transformers_bfloat16": float((narrow.argmax(-1) == best).mean()),
    }


def _example(reference) -> inputs.Example:
    return inputs.Example(
        tokens=reference["tokens"].astype(np.int32),
        token_types=reference["token_types"],
        grids=[tuple(int(n) for n in reference["grids"][0])],
        pixels=[reference["pixels"]],
    )


def decode(model: pretrained.Pretrained, reference, *, rows: int, tokens: int) -> dict:
    """Time responses of fixed length, after one warm-up of the same shape."""
    prefill, decoding = devices_lib.implementations("auto", model.dtype)
    alone = {"mesh": None, "rules": sharding.REPLICATED}
    graphdef, params = serving.prepare(
        model.graphdef, model.params, dtype=model.dtype, donate=True, **alone
    )
    sampler = engine.Engine(
        graphdef=graphdef,
        config=model.config,
        shapes=engine.Shapes(prompt_tokens=128, prompt_patches=1024, prompt_images=1),
        prefill_implementation=prefill,
        decode_implementation=decoding,
        chunk_tokens=64,
        num_slots=None,
        say=print,
        **alone,
    )
    example = _example(reference)
    stamps = []
    sampling = Sampling(
        temperature=1.0, top_k=None, top_p=None, max_tokens=tokens, end_token_ids=()
    )

    def go() -> float:
        stamps.clear()
        start = time.perf_counter()
        sampler.generate(
            params,
            [example] * (rows // 16),
            sampling,
            jax.random.key(0),
            num_responses=16,
            on_chunk=lambda *_: stamps.append(time.perf_counter()),
        )
        return time.perf_counter() - start

    go()
    runs = []
    for _ in range(3):
        whole = go()
        runs.append((whole, (stamps[-1] - stamps[0]) / (tokens - 64)))
    whole, step = sorted(runs)[1]
    text = model.config.text
    weights = sum(x.nbytes for x in jax.tree.leaves(params["text"]))
    cache = 4 * text.num_layers * text.num_kv_heads * text.head_dim
    mean_length = len(example.tokens) + 64 + (tokens - 64) / 2
    needed = weights + rows * mean_length * cache
    bandwidth = copy_bandwidth()
    return {
        "attention": decoding,
        "rows": rows,
        "tokens_a_row": tokens,
        "prompt_tokens": len(example.tokens),
        "milliseconds_a_step": step * 1e3,
        "tokens_per_second_decoding": rows / step,
        "tokens_per_second_with_prefill": rows * tokens / whole,
        "copy_terabytes_per_second": bandwidth / 1e12,
        "of_roofline": needed / bandwidth / step,
    }


def copy_bandwidth() -> float:
    """Return bytes read and written a second by a large copy."""
    x = jax.random.normal(jax.random.key(0), (1 << 29,), jnp.bfloat16)
    run = jax.jit(lambda x: -x)
    run(x).block_until_ready()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        run(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / sorted(times)[5]


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--reference", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(8)))
    before = HostMemory.now()
    start = time.perf_counter()
    with HostMemory() as memory:
        model = pretrained.load(
            args.reference / "model",
            mesh=None,
            rules=sharding.REPLICATED,
            dtype=None,
            param_dtype=None,
        )
    seconds = time.perf_counter() - start
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "parameters": qwen3_vl.num_parameters(model.params),
        "load_seconds": seconds,
        "host_peak_over_start_megabytes": (memory.peak_bytes - before) / 1e6,
        "largest_tensor_megabytes": model.params["text"]["embed"]["embedding"][...].nbytes / 1e6,
        "host_before_megabytes": before / 1e6,
        "max_rss_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }
    print(json.dumps(result, indent=1), flush=True)
    reference = np.load(args.reference / "reference.npz")
    used = {"xla", devices_lib.implementations("auto", model.dtype)[0]}
    result["logits"] = [compare(model, reference, name) for name in sorted(used)]
    print(json.dumps(result["logits"], indent=1), flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    result["decode"] = decode(model, reference, rows=args.rows, tokens=args.tokens)
    print(json.dumps(result["decode"], indent=1), flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
