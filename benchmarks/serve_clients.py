"""The clients of `benchmarks.serve_throughput`, a process of their own without JAX.

They wait until the server answers, and then ask for everything once for each line of input, which
names the kind of answers: whole or stream.
"""

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import sys
import time
from collections.abc import Sequence

import httpx
import numpy as np
from PIL import Image

SENTENCES = ("What does the picture show? Think step by step, then give the answer.",)
KINDS = ("whole", "stream")
_OPEN_FACTOR = 4  # requests that are open for each slot
_START_SECONDS = 1800


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The requests of a run."""

    num_requests: int
    num_slots: int
    tokens: int
    side: int  # of the pictures, pixels; 0: questions alone
    repeats: int  # rounds that count


def picture(number: int, side: int) -> Image.Image:
    """Return one of many pictures of noise."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))


def question(number: int) -> str:
    """Return the question about a picture."""
    return f"{SENTENCES[0]} ({number})"


async def _ask(client: httpx.AsyncClient, url: str, body: bytes, kind: str) -> int:
    """Return the tokens of an answer, whole or streamed."""
    if kind == "whole":
        answer = await client.post(url, content=body)
        answer.raise_for_status()
        return answer.json()["usage"]["completion_tokens"]
    num_tokens = 0
    async with client.stream("POST", url, content=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            # Of all events but the last the usage is null.
            if line.startswith("data: {") and not line.endswith('"usage": null}'):
                num_tokens = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    return num_tokens


async def _run_clients(url: str, work: Work, bodies: Sequence[bytes], kind: str) -> dict:
    room = asyncio.Semaphore(_OPEN_FACTOR * work.num_slots)
    limits = httpx.Limits(max_connections=_OPEN_FACTOR * work.num_slots)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:

        async def ask(body: bytes) -> int:
            async with room:
                return await _ask(client, url, body, kind)

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
        kind: [
            json.dumps(_body(number, work, is_stream=kind == "stream")).encode()
            for number in range(work.num_requests)
        ]
        for kind in KINDS
    }
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        kind = line.strip()
        result = await _run_clients(f"{url}/v1/chat/completions", work, bodies[kind], kind)
        print(json.dumps(result), flush=True)


def _body(number: int, work: Work, *, is_stream: bool) -> dict:
    parts: list[dict] = [{"type": "text", "text": question(number)}]
    if work.side:
        buffer = io.BytesIO()
        picture(number, work.side).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    body = {
        "model": "policy",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": work.tokens,
        "temperature": 1.0,
        "seed": number,
        "stream": is_stream,
    }
    return body | ({"stream_options": {"include_usage": True}} if is_stream else {})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `Work`."""
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--side", type=int, default=512, help="of the pictures; 0 for none")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")


def work_of(args: argparse.Namespace) -> Work:
    """Return what `add_arguments` has read."""
    return Work(
        num_requests=args.requests,
        num_slots=args.slots,
        tokens=args.tokens,
        side=args.side,
        repeats=args.repeats,
    )


def main() -> None:
    """Ask the server at an address."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--url", required=True)
    args = parser.parse_args()
    asyncio.run(clients(args.url, work_of(args)))


if __name__ == "__main__":
    main()
