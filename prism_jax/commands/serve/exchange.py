"""One request and its answer: limits, the key, the body, the client that leaves.

head   is there room, is the key right, is the body not too long
body   read within a time, as JSON
work   until it has answered, or the client has left: then it is cancelled
"""

import asyncio
import dataclasses
import hmac
import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from prism_jax.commands.serve import fields as fields_lib
from prism_jax.commands.serve import refusals
from prism_jax.commands.serve.measures import Measures
from prism_jax.commands.serve.refusals import Refusal

_LEFT = 499  # as in the logs of other servers: the client left
_DISCARD_SECONDS = 2.0
_JSON = json.JSONEncoder(ensure_ascii=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The limits of all requests."""

    key: bytes | None  # that a client must know; None: no key
    limit_bytes: int  # of a body
    body_seconds: float  # in which it must arrive
    most_open: int  # requests


class ClientLeft(Exception):
    """The client has closed the connection."""


class Reply:
    """The answer to a request."""

    def __init__(self, send: Send):
        self._send = send
        self.status: int | None = None  # None: nothing is sent

    async def whole(
        self, value: Any, *, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        """Send a JSON value."""
        body = _JSON.encode(value).encode()
        length = {"content-type": "application/json", "content-length": str(len(body))}
        await self._start(status, length | (headers or {}))
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, values: Sequence[Any], *, is_last: bool) -> None:
        """Send JSON values as events of a stream, all at once.

        Args:
          is_last: end the stream behind them.
        """
        if self.status is None:
            await self._start(
                200, {"content-type": "text/event-stream", "cache-control": "no-store"}
            )
        texts = [*map(_JSON.encode, values), *(["[DONE]"] if is_last else [])]
        body = "".join(f"data: {text}\n\n" for text in texts).encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def refuse(self, refusal: Refusal, *, close: bool) -> None:
        """Send an error; as the last event where the stream has begun.

        Args:
          close: end the connection, as where the body was not read.
        """
        if self.status is not None:
            await self.events([refusal.body()], is_last=False)
            await self._send({"type": "http.response.body", "body": b""})
            return
        headers = refusal.headers() | ({"connection": "close"} if close else {})
        await self.whole(refusal.body(), status=refusal.status, headers=headers)

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})


# (the JSON value of a request, when its head came, its answer)
Work = Callable[[Any, float, Reply], Coroutine[Any, Any, None]]


class Front:
    """The checks before the work of all routes."""

    def __init__(self, rules: Rules, measures: Measures):
        self._rules, self._measures = rules, measures
        self._num_open = 0
        self.is_closing = False
        self.retry_seconds: Callable[[], int] = lambda: 1

    def route(self, name: str, work: Work) -> "Route":
        """Return the ASGI application of a route whose requests have a JSON body."""
        return Route(self, name, work)

    async def run(self, route: str, work: Work, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        begun, reply, body = time.monotonic(), Reply(send), _Body(receive)
        self._num_open += 1
        self._measures.open_requests.inc()
        status = None
        try:
            await self._answer(work, scope, begun, body, reply)
        except ClientLeft:
            status = _LEFT
        except Refusal as refusal:
            status = refusal.status
            is_read = await body.discard(self._rules.limit_bytes)
            await reply.refuse(refusal, close=not is_read)
        except Exception:
            # The client learns nothing of the server's inside.
            traceback.print_exc(file=sys.stderr)
            status = 500
            await reply.refuse(Refusal("the server has failed", status=500), close=True)
        finally:
            self._num_open -= 1
            self._measures.open_requests.dec()
            self._measures.requests.labels(route, str(status or reply.status or _LEFT)).inc()
            self._measures.request_seconds.labels(route).observe(time.monotonic() - begun)

    async def _answer(
        self, work: Work, scope: Scope, begun: float, body: "_Body", reply: Reply
    ) -> None:
        headers = Headers(scope=scope)
        self.check_key(headers)
        if self.is_closing:
            raise Refusal("the server is stopping", status=503, code="stopping", retry_seconds=5)
        # Before the body is read: bodies take memory too.
        if self._num_open > self._rules.most_open:
            raise refusals.too_busy(
                f"there is room for {self._rules.most_open} requests", self.retry_seconds()
            )
        data = await body.read(headers, self._rules)
        await until_left(body.receive, work(fields_lib.parse(data), begun, reply))

    def check_key(self, headers: Headers) -> None:
        """Refuse a request without the key, where there is one."""
        if self._rules.key is None:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("utf-8", errors="replace")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._rules.key):
            raise Refusal("the API key is missing or wrong", status=401, code="invalid_api_key")


class Route:
    """An ASGI application; Starlette would wrap a function into a request and a response."""

    def __init__(self, front: Front, name: str, work: Work):
        self._front, self._name, self._work = front, name, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._front.run(self._name, self._work, scope, receive, send)


class _Body:
    """The body of a request."""

    def __init__(self, receive: Receive):
        self.receive = receive
        self._is_read = False

    async def read(self, headers: Headers, rules: Rules) -> bytes:
        """Return the whole body.

        Raises:
          Refusal: it is too long, or too slow.
          ClientLeft: it ends early.
        """
        limit = rules.limit_bytes
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise _too_long(limit)
        data = bytearray()
        try:
            async with asyncio.timeout(rules.body_seconds):
                while not self._is_read:
                    data += await self._next()
                    if len(data) > limit:
                        raise _too_long(limit)
        except TimeoutError:
            raise Refusal(
                f"the body did not arrive in {rules.body_seconds:g} s", status=408, code="timeout"
            ) from None
        return bytes(data)

    async def discard(self, limit_bytes: int) -> bool:
        """Read what is left of the body; a client that still writes would not see the answer.

        Returns whether the body came to its end.
        """
        num_bytes = 0
        try:
            async with asyncio.timeout(_DISCARD_SECONDS):
                while not self._is_read and num_bytes <= limit_bytes:
                    num_bytes += len(await self._next())
        except (TimeoutError, ClientLeft):
            pass
        return self._is_read

    async def _next(self) -> bytes:
        message: Message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        self._is_read = not message.get("more_body", False)
        return message.get("body", b"")


def _too_long(limit_bytes: int) -> Refusal:
    return Refusal(
        f"the body must have at most {limit_bytes} bytes", status=413, code="body_too_long"
    )


async def until_left(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work of a request whose body is read; cancel it when the client leaves.

    Raises:
      ClientLeft: the client was first.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientLeft
        await doing
    finally:
        await _cancelled(doing, leaving)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: Awaitable[None]) -> None:
    """Cancel tasks and wait for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
