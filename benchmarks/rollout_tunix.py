"""Time tunix's sampler on the benchmarks' rollouts of text; a process of its own.

    python -m benchmarks.rollout_tunix --size=4b --uniform 64 256 --steps 32 24 --cache=8516

Prints a line of JSON a case, as `benchmarks.rollout_hf` does. The model is tunix's Qwen3 with the
decoder's sizes and random bfloat16 weights. A step reads the whole cache, so its time is that of
the cache's size, whatever was written to it.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import sizes

_STEPS = 64  # timed behind a prefill with the large cache


def _import(name: str) -> types.ModuleType:
    """Import a module of tunix without its `__init__`, whose trainers need many packages more."""
    if "tunix" not in sys.modules:
        spec = importlib.util.find_spec("tunix")
        if spec is None:
            raise SystemExit("benchmarks.rollout_tunix needs the package google-tunix")
        package = types.ModuleType("tunix")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["tunix"] = package
    return importlib.import_module(f"tunix.{name}")


class _Words:
    """A tokenizer whose texts are numbers; nothing ends a response."""

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, tokens: list[int]) -> str:
        return ""

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return 0


def _model(size: str) -> nnx.Module:
    text, library = sizes.SIZES[size].text, _import("models.qwen3.model")
    config = library.ModelConfig(
        num_layers=text.num_layers,
        vocab_size=text.vocab_size,
        embed_dim=text.hidden_size,
        hidden_dim=text.intermediate_size,
        num_heads=text.num_heads,
        head_dim=text.head_dim,
        num_kv_heads=text.num_kv_heads,
        rope_theta=int(text.rope_theta),
        norm_eps=text.rms_norm_eps,
        use_tied_embedding=text.tie_word_embeddings,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )
    return library.Qwen3(config, rngs=nnx.Rngs(0))


def _timed(function: Callable[..., Any], stamps: list[float]) -> Callable[..., Any]:
    """Return the function waited for, its seconds noted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        result = jax.block_until_ready(function(*args, **kwargs))
        stamps.append(time.perf_counter() - begun)
        return result

    return call


class _Sampler:
    """tunix's sampler with a cache of one size, its prefill and its decoding timed."""

    def __init__(self, model: nnx.Module, size: str, *, cache: int):
        text, library = sizes.SIZES[size].text, _import("generate.sampler")
        self._most = min(text.vocab_size - 10, 150_000)
        self._sampler = library.Sampler(
            model,
            _Words(),
            library.CacheConfig(
                cache_size=cache,
                num_layers=text.num_layers,
                num_kv_heads=text.num_kv_heads,
                head_dim=text.head_dim,
            ),
        )
        self._prefill: list[float] = []
        self._decode: list[float] = []
        for name, stamps in (("prefill", self._prefill), ("decode", self._decode)):
            attribute = f"_compiled_{name}_fn"
            setattr(self._sampler, attribute, _timed(getattr(self._sampler, attribute), stamps))

    def __call__(self, *, rows: int, prompt_tokens: int, tokens: int) -> dict[str, float]:
        """Return the seconds of the second of two batches, by part."""
        rng = np.random.default_rng(0)
        words = rng.integers(1, self._most, (rows, prompt_tokens))
        prompts = [" ".join(map(str, row)) for row in words]
        for _ in range(2):
            begun = time.perf_counter()
            out = self._sampler(
                prompts,
                max_generation_steps=tokens,
                max_prompt_length=prompt_tokens,
                temperature=1.0,
                top_p=1.0,
                seed=0,
            )
            seconds = time.perf_counter() - begun
        if any(len(row) != tokens for row in out.tokens):
            raise RuntimeError("a response did not reach its limit")
        return {
            "seconds": seconds,
            "prefill_seconds": self._prefill[-1],
            "step_seconds": self._decode[-1] / (tokens - 1),
        }


def _print(result: dict) -> None:
    print(json.dumps(result), flush=True)


def main() -> None:
    """Time uniform batches, and the step of a batch that has room for the longest response."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=sizes.SIZES, required=True)
    parser.add_argument("--prompt_tokens", type=int, default=324)
    parser.add_argument(
        "--uniform", type=int, nargs=2, metavar=("ROWS", "TOKENS"), action="append", required=True
    )
    parser.add_argument("--steps", type=int, nargs="+", help="rows, the first number that fits")
    parser.add_argument("--cache", type=int, help="places of a row, for --steps")
    args = parser.parse_args()
    begun = time.perf_counter()
    model = _model(args.size)
    jax.block_until_ready(nnx.state(model))
    versions = {name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax")}
    _print({"case": "open", "seconds": time.perf_counter() - begun, "versions": versions})
    given = {"prompt_tokens": args.prompt_tokens}
    for rows, tokens in args.uniform:
        sampler = _Sampler(model, args.size, cache=args.prompt_tokens + tokens)
        try:
            timed = sampler(rows=rows, tokens=tokens, **given)
        except jax.errors.JaxRuntimeError as error:
            _print({"case": "none", "rows": rows, "tokens": tokens, "error": str(error)[:300]})
            continue
        timed |= {"tokens_per_second": rows * tokens / timed["seconds"]}
        _print({"case": "uniform", "rows": rows, "tokens": tokens, **timed})
        del sampler
    for rows in args.steps or ():
        sampler = _Sampler(model, args.size, cache=args.cache)
        try:
            timed = sampler(rows=rows, tokens=min(_STEPS, args.cache - args.prompt_tokens), **given)
        except jax.errors.JaxRuntimeError as error:
            _print({"case": "none", "rows": rows, "cache": args.cache, "error": str(error)[:300]})
            continue
        _print({"case": "steps", "rows": rows, "cache": args.cache, "after": 0, **timed})
        break


if __name__ == "__main__":
    main()
