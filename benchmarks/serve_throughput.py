"""Measure the server against `Engine.generate` on the same prompts; write a record.

    python -m benchmarks.serve_throughput --out=FILE.json             (one GPU, the extra `serve`)
    python -m benchmarks.serve_throughput --size=demo --tokens=192 --requests=128 --side=64 \
        --out=FILE.json -- --max_prompt_tokens=128 --max_images=1     (a CPU)

The server is the one of `python -m prism_jax serve` with random weights, its clients are another
process. Both sides draw one response of at most `--tokens` tokens to each prompt, a picture and a
question, with as many slots and as many tokens between two looks; the clients keep twice as many
requests open. In a round `Engine.generate` draws everything, then the clients ask for whole
answers, then for streams; the other side waits. Rounds are repeated, the first does not count, and
the ratio is the median of the rounds' ratios.
"""

import argparse
import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import httpx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks import kernel_times, records, rollout_cases, sizes
from models import inputs
from models.config import Qwen3VLConfig
from prism_jax.checkpoints import pretrained
from prism_jax.commands.serve import encoding, opened, server, text
from prism_jax.commands.serve import main as serve_main
from prism_jax.data import chat, examples, processor, tokenizer_files
from prism_jax.rollout.sampling import Sampling

_TARGET = 0.9
_SENTENCES = ("What does the picture show? Think step by step, then give the answer.",)
_KINDS = ("whole", "stream")
_DEMO = pathlib.Path(__file__).parents[1] / "launch/demo_base"
_OPEN_FACTOR = 2  # requests that are open for each slot
_START_SECONDS = 1800


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The requests of a run."""

    num_requests: int
    num_slots: int
    tokens: int
    side: int  # of the pictures, pixels
    repeats: int  # rounds that count


def picture(number: int, side: int) -> Image.Image:
    """Return one of many pictures of noise."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))


def question(number: int) -> str:
    """Return the question about a picture."""
    return f"{_SENTENCES[0]} ({number})"


# The clients, in a process of their own.


async def _ask(client: httpx.AsyncClient, url: str, body: dict) -> int:
    """Return the tokens of an answer, whole or streamed."""
    if not body["stream"]:
        answer = await client.post(url, json=body)
        answer.raise_for_status()
        return answer.json()["usage"]["completion_tokens"]
    num_tokens = 0
    async with client.stream("POST", url, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                usage = json.loads(line.removeprefix("data: "))["usage"]
                num_tokens = usage["completion_tokens"] if usage else num_tokens
    return num_tokens


async def _run_clients(url: str, work: Work, bodies: Sequence[dict]) -> dict:
    room = asyncio.Semaphore(_OPEN_FACTOR * work.num_slots)
    limits = httpx.Limits(max_connections=_OPEN_FACTOR * work.num_slots)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:

        async def ask(body: dict) -> int:
            async with room:
                return await _ask(client, url, body)

        begun = time.perf_counter()
        tokens = sum(await asyncio.gather(*map(ask, bodies)))
        seconds = time.perf_counter() - begun
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


async def clients(url: str, work: Work) -> None:
    """Wait for the server; ask everything in each kind of answer that a line of input names."""
    deadline = time.monotonic() + _START_SECONDS
    async with httpx.AsyncClient() as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"{url}/health")).status_code == 200:
                    break
            if time.monotonic() > deadline:
                raise TimeoutError("the server does not answer")
            await asyncio.sleep(0.5)
    bodies = {
        kind: [_body(n, work, is_stream=kind == "stream") for n in range(work.num_requests)]
        for kind in _KINDS
    }
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        result = await _run_clients(f"{url}/v1/chat/completions", work, bodies[line.strip()])
        print(json.dumps(result), flush=True)


def _body(number: int, work: Work, *, is_stream: bool) -> dict:
    buffer = io.BytesIO()
    picture(number, work.side).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question(number)},
    ]
    body = {
        "model": "policy",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": work.tokens,
        "temperature": 1.0,
        "seed": number,
        "stream": is_stream,
    }
    return body | ({"stream_options": {"include_usage": True}} if is_stream else {})


# The two sides.


def _words(
    config: Qwen3VLConfig, folder: pathlib.Path
) -> tuple[processor.Processor, Qwen3VLConfig]:
    """Return a processor for the sizes, and the sizes with its ids."""
    ids = tokenizer_files.write(
        folder,
        _SENTENCES,
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


def _examples(words: processor.Processor, work: Work) -> list[inputs.Example]:
    prompts = []
    for number in range(work.num_requests):
        turn = chat.turn("user", question(number), num_images=1)
        shown = [picture(number, work.side)]
        encoded = words.encode([turn], images=shown, add_generation_prompt=True)
        prompts.append(examples.from_encoded(encoded, words))
    return prompts


def _generate(
    sampler: rollout_cases.Sampler,
    words: processor.Processor,
    prompts: Sequence[inputs.Example],
    work: Work,
) -> dict[str, float]:
    """Return the rate of `Engine.generate`; encoding its prompts is not counted."""
    sampling = Sampling(
        temperature=1.0,
        top_k=None,
        top_p=None,
        max_tokens=work.tokens,
        end_token_ids=words.ids.ends,
    )
    begun = time.perf_counter()
    rollout = sampler.engine.generate(
        sampler.params, prompts, sampling, jax.random.key(0), num_responses=1
    )
    seconds = time.perf_counter() - begun
    tokens = int(rollout.lengths.sum())
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
    args: argparse.Namespace, policy: opened.Policy, alone: Callable[[], dict], work: Work
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
            *(sys.executable, "-m", "benchmarks.serve_throughput"),
            f"--clients=http://127.0.0.1:{listener.getsockname()[1]}",
            *_arguments(work),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
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
            for _ in range(1 + work.repeats):
                results.append({"generate": await asyncio.to_thread(alone)})
                for kind in _KINDS:
                    used = resource.getrusage(resource.RUSAGE_SELF)
                    process.stdin.write(f"{kind}\n".encode())
                    results[-1][kind] = json.loads(await line())
                    results[-1][kind]["server_cpu_seconds"] = _cpu_seconds(used)
                kernel_times.report(results[-1])
        finally:
            if process.returncode is None:
                process.kill()
            life.stop(signal.SIGTERM)
            await serving
    return results[1:]


def _cpu_seconds(before: resource.struct_rusage) -> float:
    now = resource.getrusage(resource.RUSAGE_SELF)
    return now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime


def _arguments(work: Work) -> list[str]:
    named = dataclasses.asdict(work).items()
    return [f"--{name.removeprefix('num_')}={value}" for name, value in named]


def _config(size: str) -> Qwen3VLConfig:
    return pretrained.config_of(_DEMO)[1] if size == "demo" else sizes.SIZES[size]


def measure(size: str, work: Work, options: Sequence[str]) -> dict:
    """Return the record."""
    args = serve_main.parser().parse_args(
        [
            *("--model=policy", "--name=policy", "--port=0"),
            f"--num_slots={work.num_slots}",
            f"--max_new_tokens={max(work.tokens, 256)}",
            *options,
        ]
    )
    with tempfile.TemporaryDirectory() as name:
        words, config = _words(_config(size), pathlib.Path(name))
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
    results = asyncio.run(
        _rounds(
            args,
            _policy(sampler, words, args),
            lambda: _generate(sampler, words, prompts, work),
            work,
        )
    )
    ratios = {
        kind: statistics.median(
            one[kind]["tokens_per_second"] / one["generate"]["tokens_per_second"] for one in results
        )
        for kind in _KINDS
    }
    return records.make(
        "serve_throughput",
        "tokens a second of the server's clients over those of Engine.generate on the same prompts "
        "with as many slots; median of the rounds",
        {
            "whole answers": records.ratio(ratios["whole"], f">= {_TARGET}"),
            "streams": records.ratio(ratios["stream"], f">= {_TARGET}"),
        },
        limit="the host: pictures are decoded, tokens become text and events beside the sampler; "
        "on a CPU these and the clients take the cores from the model",
        raw={"rounds": results, "work": dataclasses.asdict(work), "size": size}
        | {"parameters": _num_parameters(sampler), "host_cores": os.cpu_count()},
        module="benchmarks.serve_throughput",
    )


def _num_parameters(sampler: rollout_cases.Sampler) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(sampler.params))


def main() -> None:
    """Measure, print the record and write it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=[*sizes.SIZES, "demo"], default="4b")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--side", type=int, default=512, help="of the pictures")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--clients", help="only ask the server at this address, for this program")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("options", nargs="*", help="of serve, after --")
    args = parser.parse_args()
    work = Work(
        num_requests=args.requests,
        num_slots=args.slots,
        tokens=args.tokens,
        side=args.side,
        repeats=args.repeats,
    )
    if args.clients is not None:
        asyncio.run(clients(args.clients, work))
        return
    # The sampler fills the memory; read when JAX first asks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    written = json.dumps(measure(args.size, work, args.options), indent=1)
    print(written)
    if args.out is not None:
        args.out.write_text(written + "\n")


if __name__ == "__main__":
    main()
