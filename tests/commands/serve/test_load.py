"""Many clients at a time, some slow, some gone, some wrong: nothing is lost and nothing is left."""

import asyncio
import collections
import json
import socket
import time

import httpx
import openai

from tests.commands.serve import running

_QUESTIONS = ["How many bars?", "Describe the image.", "What is the sum?", "Let me think: 3 + 4"]
_TOKENS = 12


def _body(question, **settings):
    return {
        "model": "policy",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": _TOKENS,
        "temperature": 0,
    } | settings


def _head(server, length):
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {running.KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


async def _whole(client, question):
    answer = await client.chat.completions.create(**_body(question))
    return answer.choices[0].message.content, answer.usage.completion_tokens


async def _streamed(client, question):
    text, num_tokens = "", None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async for event in await client.chat.completions.create(**_body(question), **options):
        text += event.choices[0].delta.content if event.choices else ""
        num_tokens = event.usage.completion_tokens if event.usage else num_tokens
    return text, num_tokens


async def _slow(server, question):
    """Read a stream a few bytes at a time, through a buffer that holds little."""
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    link.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(link, server.address)
    body = json.dumps(_body(question, stream=True)).encode()
    await loop.sock_sendall(link, _head(server, len(body)) + body)
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        part = await loop.sock_recv(link, 256)
        assert part, data
        data += part
        await asyncio.sleep(0.02)
    link.close()
    lines = [x[6:] for x in data.splitlines() if x.startswith(b"data: ")]
    assert lines.pop().strip() == b"[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines]
    return "".join(choice["delta"]["content"] for choice in choices), None


async def _gone(server, question, number):
    """Leave: in the head, in the body, while waiting, or in the stream."""
    body = json.dumps(_body(question, stream=number % 2 == 0, n=2)).encode()
    sent = _head(server, len(body)) + body
    reader, writer = await asyncio.open_connection(*server.address)
    writer.write(sent[: (40, len(sent) - 5, len(sent), len(sent))[number % 4]])
    await writer.drain()
    if number % 4 == 2:
        await reader.read(20)
    elif number % 8 == 7:
        await asyncio.sleep(0.3)
    writer.transport.abort()


async def _wrong(server, number):
    """Send no request, or a wrong one; return the status."""
    body = [b'{"model": "poli', b'{"model": "policy"}', b"\xff\xfe", b"[]"][number % 4]
    sent = _head(server, len(body)) + body
    if number % 8 == 4:
        sent = b"\x16\x03\x01 no HTTP at all\r\n\r\n"
    reader, writer = await asyncio.open_connection(*server.address)
    writer.write(sent)
    line = await reader.readline()
    writer.close()
    return int(line.split()[1])


async def _all(server):
    limits = httpx.Limits(max_connections=200)
    http = httpx.AsyncClient(limits=limits, timeout=120)
    client = openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key=running.KEY, http_client=http, max_retries=0
    )
    works, kinds = [], []
    for number in range(200):
        question = _QUESTIONS[number % 4]
        kind = ("whole", "streamed", "gone", "wrong", "slow")[number // 4 % 5]
        works.append(
            {
                "whole": lambda q=question: _whole(client, q),
                "streamed": lambda q=question: _streamed(client, q),
                "slow": lambda q=question: _slow(server, q),
                "gone": lambda q=question, n=number: _gone(server, q, n),
                "wrong": lambda n=number // 20: _wrong(server, n),
            }[kind]()
        )
        kinds.append((kind, question))
    results = await asyncio.gather(*works)
    await client.close()
    return list(zip(kinds, results, strict=True))


def test_two_hundred_clients_at_a_time_lose_nothing_and_leave_nothing(server):
    client = server.client()
    expected = {}
    for question in _QUESTIONS:
        answer = client.chat.completions.create(**_body(question))
        text = answer.choices[0].message.content
        expected[question] = text, answer.usage.completion_tokens
    assert len(set(expected.values())) == 4
    client.close()
    before = server.wait_until_idle()
    results = asyncio.run(_all(server))
    counts = collections.Counter(kind for (kind, _), _ in results)
    assert set(counts.values()) == {40}
    for (kind, question), result in results:
        if kind in ("whole", "streamed", "slow"):
            text, num_tokens = expected[question]
            assert result in ((text, num_tokens), (text, None)), kind
        elif kind == "wrong":
            assert result == 400
    after = server.wait_until_idle()
    name = 'prism_jax_requests_total{route="chat/completions",status="200"}'
    # A client may leave after its answer is on its way.
    assert 120 <= after[name] - before[name] <= 160
    _check_that_nothing_is_left(server, before)


def _check_that_nothing_is_left(server, before):
    """Compare open files, and draw in all slots again."""
    deadline = time.monotonic() + 30
    while server.metrics()["process_open_fds"] > before["process_open_fds"] + 1:
        assert time.monotonic() < deadline, "connections are left"
        time.sleep(0.1)
    with server.client() as client:
        answer = client.chat.completions.create(**_body(_QUESTIONS[0], n=running.SLOTS))
    assert len({choice.message.content for choice in answer.choices}) == 1
    assert not [line for line in server.lines() if "Traceback" in line]


def test_a_client_that_leaves_frees_its_slots_and_its_places_in_the_queue(server):
    before = server.wait_until_idle()["prism_jax_response_tokens_total"]
    with server.client() as client:
        stream = client.chat.completions.create(
            **_body(_QUESTIONS[0], n=16, max_tokens=running.TOKENS, temperature=1.0), stream=True
        )
        next(iter(stream))
        stream.close()
    drawn = server.wait_until_idle()["prism_jax_response_tokens_total"] - before
    # Eight of the sixteen had a slot, and they were at their first tokens.
    assert 0 < drawn < 8 * running.TOKENS


def test_a_full_queue_sends_clients_away_with_a_time_to_come_again(server):
    most = (running.SLOTS + running.QUEUE) // running.RESPONSES

    async def fill():
        """Return the first refusal; the other clients leave then."""
        body = _body(_QUESTIONS[0], n=running.RESPONSES, max_tokens=running.TOKENS)
        headers = {"authorization": f"Bearer {running.KEY}"}
        limits = httpx.Limits(max_connections=most + 4)
        async with httpx.AsyncClient(timeout=120, limits=limits, headers=headers) as client:
            url = f"{server.url}/v1/chat/completions"
            posts = [asyncio.create_task(client.post(url, json=body)) for _ in range(most + 4)]
            for done in asyncio.as_completed(posts):
                answer = await done
                if answer.status_code != 200:
                    break
            for post in posts:
                post.cancel()
            await asyncio.gather(*posts, return_exceptions=True)
            return answer

    refused = asyncio.run(fill())
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "queue_full"
    server.wait_until_idle()
