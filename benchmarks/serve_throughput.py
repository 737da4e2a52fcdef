"""Measure the server against `Engine.generate` on the same prompts; write a record.

    python -m benchmarks.serve_throughput --out=FILE.json             (one GPU, the extra `serve`)
    python -m benchmarks.serve_throughput --size=medium --slots=16 --requests=64 --tokens=128 \
        --side=0 --out=FILE.json -- --max_prompt_tokens=64 --max_images=0  (CPU)

The server is the one of `python -m prism_jax serve` with random weights, its clients are another
process. Both sides draw one response of at most `--tokens` tokens to each prompt, a picture and a
question, with as many slots and as many tokens between two looks; the clients keep four times as
many requests open. In a round `Engine.generate` draws everything, then the clients ask for whole
answers, then for streams; the other side waits. Everything is compiled before the first round, and
the ratios are medians of those of the rounds: by the clock, and on a CPU also by the processor time
of the server's process, with the model in it, which depends less on what else the machine does.

With `--baseline=session` slots like those of the server, with its programs, take the place of
`Engine.generate`. That reads several prompts in a row as long as all: on a CPU, where attention
computes whole rows, it then takes longer than the server.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from benchmarks import kernel_times, records, rollout_cases, serve_clients, sizes
from models import inputs, presets
from models.config import Qwen3VLConfig
from prism_jax.commands.serve import encoding, opened, server, text
from prism_jax.commands.serve import main as serve_main
from prism_jax.data import chat, examples, processor, tokenizer_files
from prism_jax.rollout import session as session_lib
from prism_jax.rollout.sampling import Sampling

_TARGET = 0.9
# 13 million parameters, for CPUs: on two cores a step of 64 responses takes longer than their text.
_MEDIUM = dataclasses.replace(
    presets.TINY,
    text=dataclasses.replace(
        presets.TINY.text,
        vocab_size=2048,
        hidden_size=384,
        intermediate_size=1536,
        num_layers=6,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        mrope_section=(12, 10, 10),
    ),
    vision=dataclasses.replace(presets.TINY.vision, out_hidden_size=384),
)
_BASELINES = {
    "generate": "Engine.generate with as many slots",
    "session": "the same slots without a server",
}
_SIZES = {**sizes.SIZES, "medium": _MEDIUM}


def _words(
    config: Qwen3VLConfig, folder: pathlib.Path
) -> tuple[processor.Processor, Qwen3VLConfig]:
    """Return a processor for the sizes, and the sizes with its ids."""
    ids = tokenizer_files.write(
        folder,
        serve_clients.SENTENCES,
        num_merges=64,
        min_pixels=32 * 32,
        max_pixels=1 << 20,
        video_min_pixels=32 * 32,
        video_max_pixels=1 << 20,
    )
    config = dataclasses.replace(
        config,
        text=dataclasses.replace(
            config.text, vocab_size=max(config.text.vocab_size, ids.vocab_size)
        ),
        image_token_id=ids.image_token_id,
        video_token_id=ids.video_token_id,
        vision_start_token_id=ids.vision_start_token_id,
        vision_end_token_id=ids.vision_end_token_id,
    )
    values = sizes.config_json(config) | {
        "image_token_id": ids.image_token_id,
        "video_token_id": ids.video_token_id,
        "vision_start_token_id": ids.vision_start_token_id,
        "vision_end_token_id": ids.vision_end_token_id,
    }
    (folder / "config.json").write_text(json.dumps(values))
    ends = {"eos_token_id": [ids.eos_token_id]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return processor.Processor.from_folder(folder), config


def _examples(words: processor.Processor, work: serve_clients.Work) -> list[inputs.Example]:
    prompts = []
    for number in range(work.num_requests):
        shown = [serve_clients.picture(number, work.side)] if work.side else []
        turn = chat.turn("user", serve_clients.question(number), num_images=len(shown))
        encoded = words.encode([turn], images=shown, add_generation_prompt=True)
        prompts.append(examples.from_encoded(encoded, words))
    return prompts


def _generate(
    sampler: rollout_cases.Sampler,
    words: processor.Processor,
    prompts: Sequence[inputs.Example],
    work: serve_clients.Work,
    *,
    most_tokens: int | None = None,
) -> dict[str, float]:
    """Return the rate of `Engine.generate`; encoding its prompts is not counted.

    Args:
      most_tokens: of each response, in slots for `work.tokens`; None: that.
    """
    begun = time.perf_counter()
    rollout = sampler.engine.generate(
        sampler.params,
        prompts,
        _sampling(words, work),
        jax.random.key(0),
        num_responses=1,
        limits=[most_tokens or work.tokens] * len(prompts),
    )
    return _rate(int(rollout.lengths.sum()), begun)


def _drive(
    session: session_lib.Session,
    words: processor.Processor,
    prompts: Sequence[inputs.Example],
    work: serve_clients.Work,
) -> dict[str, float]:
    """Return the rate of slots like the server's, without a server."""
    begun = time.perf_counter()
    streams = [
        stream
        for number, prompt in enumerate(prompts)
        for stream in session.submit(
            prompt, [_sampling(words, work)], jax.random.key(number), numbers=[0]
        )
    ]
    left = len(streams)
    while left:
        left -= len(session.look())
    return _rate(sum(len(stream.ticket.tokens) for stream in streams), begun)


def _sampling(words: processor.Processor, work: serve_clients.Work) -> Sampling:
    return Sampling(
        temperature=1.0,
        top_k=None,
        top_p=None,
        max_tokens=work.tokens,
        end_token_ids=words.ids.ends,
    )


def _rate(tokens: int, begun: float) -> dict[str, float]:
    seconds = time.perf_counter() - begun
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def _policy(
    sampler: rollout_cases.Sampler, words: processor.Processor, args: argparse.Namespace
) -> opened.Policy:
    """Return what `Policy.open` returns for a folder."""
    room = encoding.Room.of(args.max_prompt_tokens, args.max_images, words)
    return opened.Policy(
        words=words,
        vocabulary=text.Vocabulary.of(words),
        room=room,
        session=opened.session(sampler.engine, sampler.params, words, room, args),
    )


async def _rounds(
    args: argparse.Namespace,
    policy: opened.Policy,
    alone: Callable[[], dict],
    work: serve_clients.Work,
) -> list[dict[str, dict]]:
    """Run the server with its clients beside it; return the results of each round."""
    results: list[dict[str, dict]] = []
    with (
        concurrent.futures.ThreadPoolExecutor(args.num_threads) as threads,
        contextlib.closing(server.listener_of(args.host, args.port)) as listener,
    ):
        life = server.Life(args, None, policy, None, threads, kernel_times.say)
        serving = asyncio.create_task(life.serve(listener))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.serve_clients"),
            f"--url=http://127.0.0.1:{listener.getsockname()[1]}",
            *_arguments(work),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )

        async def line() -> bytes:
            """Return the clients' next line; raise what the server raises before."""
            reading = asyncio.create_task(process.stdout.readline())
            await asyncio.wait({serving, reading}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            if not await reading:
                raise RuntimeError("the clients have failed")
            return reading.result()

        try:
            await line()
            for _ in range(work.repeats):
                results.append({})
                for kind in ("baseline", *serve_clients.KINDS):
                    begun = time.process_time()
                    if kind == "baseline":
                        result = await asyncio.to_thread(alone)
                    else:
                        process.stdin.write(f"{kind}\n".encode())
                        result = json.loads(await line())
                    seconds = time.process_time() - begun
                    results[-1][kind] = result | {
                        "tokens_per_processor_second": result["tokens"] / seconds
                    }
                kernel_times.report(results[-1])
        finally:
            if process.returncode is None:
                process.kill()
            life.stop(signal.SIGTERM)
            await serving
    return results


def _arguments(work: serve_clients.Work) -> list[str]:
    named = dataclasses.asdict(work).items()
    return [f"--{name.removeprefix('num_')}={value}" for name, value in named]


def measure(size: str, work: serve_clients.Work, baseline: str, options: Sequence[str]) -> dict:
    """Return the record."""
    args = serve_main.parser().parse_args(
        [
            *("--model=policy", "--name=policy", "--port=0"),
            f"--num_slots={work.num_slots}",
            f"--max_new_tokens={work.tokens}",
            *options,
        ]
    )
    with tempfile.TemporaryDirectory() as name:
        words, config = _words(_SIZES[size], pathlib.Path(name))
    made = rollout_cases.random_sampler(
        config,
        jax.devices()[:1],
        chunk_tokens=args.chunk_tokens,
        tensor=1,
        dtype=jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16,
    )
    sampler = dataclasses.replace(
        made, engine=dataclasses.replace(made.engine, num_slots=args.num_slots)
    )
    prompts = _examples(words, work)
    policy = _policy(sampler, words, args)
    if baseline == "generate":
        _generate(sampler, words, prompts, work, most_tokens=1)
        alone = functools.partial(_generate, sampler, words, prompts, work)
    else:
        alone = functools.partial(
            _drive, _policy(sampler, words, args).session, words, prompts, work
        )
    results = asyncio.run(_rounds(args, policy, alone, work))
    return _record(
        results,
        baseline,
        {
            "rounds": results,
            "work": dataclasses.asdict(work),
            "size": size,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(sampler.params)),
            "host_cores": os.cpu_count(),
        },
    )


def _record(results: Sequence[dict[str, dict]], baseline: str, raw: dict) -> dict:
    rates = {"clock": "tokens_per_second"}
    if jax.default_backend() == "cpu":
        rates["processor"] = "tokens_per_processor_second"
    clock = [
        _ratio([one], kind, "tokens_per_second") for one in results for kind in serve_clients.KINDS
    ]
    return records.make(
        "serve_throughput",
        f"tokens a second of the server's clients over those of {_BASELINES[baseline]} on the same "
        f"prompts, by the {' and the '.join(rates)}; medians of the rounds",
        {
            f"{name}, {unit}": records.ratio(_ratio(results, kind, rate), f">= {_TARGET}")
            for kind, name in (("whole", "whole answers"), ("stream", "streams"))
            for unit, rate in rates.items()
        },
        limit="prompts are encoded and tokens become text and events beside the sampler; by the "
        "clock also what else runs on the machine, the clients among it: single rounds gave "
        f"{min(clock):.2f} to {max(clock):.2f}.",
        raw=raw,
        module="benchmarks.serve_throughput",
    )


def _ratio(results: Sequence[dict[str, dict]], kind: str, rate: str) -> float:
    return statistics.median(one[kind][rate] / one["baseline"][rate] for one in results)


def main() -> None:
    """Measure, print the record and write it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=list(_SIZES), default="4b")
    serve_clients.add_arguments(parser)
    parser.add_argument("--baseline", choices=list(_BASELINES), default="generate")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("options", nargs="*", help="of serve, after --")
    args = parser.parse_args()
    # The sampler fills the memory; read when JAX first asks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    work = serve_clients.work_of(args)
    records.emit(measure(args.size, work, args.baseline, args.options), args.out)


if __name__ == "__main__":
    main()
