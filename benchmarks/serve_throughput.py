"""Measure the server against `Engine.generate` on the same prompts; write a record.

    python -m benchmarks.serve_throughput --out=FILE.json             (one GPU, the extra `serve`)

The server is the one of `python -m prism_jax serve` with random weights, its clients are another
process. Both sides draw one response of `--tokens` tokens to each prompt, a picture and a question,
with as many slots; the clients keep twice as many requests open. Each side runs twice, the second
run counts. `--size=tiny` runs anywhere and measures nothing worth keeping.
"""

import argparse
import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import datetime
import io
import json
import os
import pathlib
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

import httpx
import jax
import numpy as np
from PIL import Image

from benchmarks import kernel_times, rollout_cases, sizes
from models import inputs
from models.config import Qwen3VLConfig
from prism_jax.commands.serve import encoding, opened, server, text
from prism_jax.commands.serve import main as serve_main
from prism_jax.data import chat, examples, processor, tokenizer_files
from prism_jax.rollout.sampling import Sampling

_TARGET = 0.9
_SENTENCES = ("What does the picture show? Think step by step, then give the answer.",)
_CHUNK_TOKENS = 32  # of `Engine.generate`, as in benchmarks.rollout
_OPEN_FACTOR = 2  # requests that are open for each slot
_START_SECONDS = 1800


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The requests of a run."""

    num_requests: int
    num_slots: int
    tokens: int
    side: int  # of the pictures, pixels


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


async def clients(url: str, work: Work) -> dict:
    """Wait for the server, then ask everything twice in whole answers, and twice in streams."""
    deadline = time.monotonic() + _START_SECONDS
    async with httpx.AsyncClient() as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"{url}/health")).status_code == 200:
                    break
            if time.monotonic() > deadline:
                raise TimeoutError("the server does not answer")
            await asyncio.sleep(0.5)
    results = {}
    for kind in ("whole", "stream"):
        bodies = [
            _body(number, work, is_stream=kind == "stream") for number in range(work.num_requests)
        ]
        for _ in range(2):
            results[kind] = await _run_clients(f"{url}/v1/chat/completions", work, bodies)
    return results


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
    sampler: rollout_cases.Sampler, words: processor.Processor, work: Work
) -> dict[str, float]:
    """Return the rate of `Engine.generate`; encoding its prompts is not counted."""
    prompts = _examples(words, work)
    sampling = Sampling(
        temperature=1.0,
        top_k=None,
        top_p=None,
        max_tokens=work.tokens,
        end_token_ids=words.ids.ends,
    )
    drawing = dataclasses.replace(sampler.engine, num_slots=work.num_slots)
    for _ in range(2):
        begun = time.perf_counter()
        rollout = drawing.generate(
            sampler.params, prompts, sampling, jax.random.key(0), num_responses=1
        )
        seconds = time.perf_counter() - begun
    tokens = int(rollout.lengths.sum())
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def _serve(
    sampler: rollout_cases.Sampler, words: processor.Processor, work: Work, options: Sequence[str]
) -> dict:
    """Run the server, and its clients beside it; return what the clients measured."""
    args = serve_main.parser().parse_args(
        [
            *("--model=policy", "--name=policy", "--port=0"),
            f"--num_slots={work.num_slots}",
            f"--max_new_tokens={max(work.tokens, 256)}",
            *options,
        ]
    )
    room = encoding.Room.of(args.max_prompt_tokens, args.max_images, words)
    policy = opened.Policy(
        words=words,
        vocabulary=text.Vocabulary.of(words),
        room=room,
        session=opened.session(
            dataclasses.replace(
                sampler.engine, num_slots=args.num_slots, chunk_tokens=args.chunk_tokens
            ),
            sampler.params,
            words,
            room,
            args,
        ),
    )

    async def both() -> dict:
        with contextlib.closing(server.listener_of(args.host, args.port)) as listener:
            life = server.Life(args, None, policy, None, threads, kernel_times.say)
            serving = asyncio.create_task(life.serve(listener))
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "benchmarks.serve_throughput"),
                f"--clients=http://127.0.0.1:{listener.getsockname()[1]}",
                *_arguments(work),
                stdout=asyncio.subprocess.PIPE,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
            reading = asyncio.create_task(process.communicate())
            await asyncio.wait({serving, reading}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                process.kill()
                serving.result()
            life.stop(signal.SIGTERM)
            await serving
            return json.loads((await reading)[0].splitlines()[-1])

    with concurrent.futures.ThreadPoolExecutor(args.num_threads) as threads:
        return asyncio.run(both())


def _arguments(work: Work) -> list[str]:
    named = dataclasses.asdict(work).items()
    return [f"--{name.removeprefix('num_')}={value}" for name, value in named]


def measure(size: str, work: Work, options: Sequence[str]) -> dict:
    """Return the record."""
    with tempfile.TemporaryDirectory() as name:
        words, config = _words(sizes.SIZES[size], pathlib.Path(name))
    sampler = rollout_cases.random_sampler(
        config, jax.devices()[:1], chunk_tokens=_CHUNK_TOKENS, tensor=1
    )
    alone = _generate(sampler, words, work)
    kernel_times.report({"generate": alone})
    served = _serve(sampler, words, work, options)
    kernel_times.report({"served": served})
    ratios = {
        kind: result["tokens_per_second"] / alone["tokens_per_second"]
        for kind, result in served.items()
    }
    ratio = min(ratios.values())
    return {
        "record": "serve_throughput",
        "claim": "tokens a second of the server's clients, of whole answers and of streams, over "
        "those of Engine.generate on the same prompts with as many slots",
        "ratio": ratio,
        "target": _TARGET,
        "is_met": ratio >= _TARGET,
        "limit": "the host: pictures are decoded, tokens become text and events beside the sampler",
        "raw": {"ratios": ratios, "generate": alone, "served": served}
        | {"work": dataclasses.asdict(work), "host_cores": os.cpu_count()},
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the record and write it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=list(sizes.SIZES), default="4b")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--side", type=int, default=512, help="of the pictures")
    parser.add_argument("--clients", help="only ask the server at this address, for this program")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("options", nargs="*", help="of serve, after --")
    args = parser.parse_args(arguments)
    work = Work(
        num_requests=args.requests, num_slots=args.slots, tokens=args.tokens, side=args.side
    )
    if args.clients is not None:
        print(json.dumps(asyncio.run(clients(args.clients, work))))
        return
    # The sampler fills the memory; read when JAX first asks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    record = measure(args.size, work, args.options)
    given = sys.argv[1:] if arguments is None else arguments
    record |= {
        "size": args.size,
        "device": f"{jax.devices()[0].device_kind} x 1",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "command": " ".join(["python -m benchmarks.serve_throughput", *given]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    written = json.dumps(record, indent=1)
    print(written)
    if args.out is not None:
        args.out.write_text(written + "\n")


if __name__ == "__main__":
    main()
