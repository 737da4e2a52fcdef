"""A chat endpoint on the loopback interface that answers from a script, and misbehaves by it."""

import contextlib
import dataclasses
import http.server
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Json = Any
MODEL = "fake-teacher"
# Tokens that every reply tells.
INPUT_TOKENS, OUTPUT_TOKENS = 100, 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """One request as the endpoint got it."""

    seconds: float  # by the monotonic clock
    path: str
    headers: dict[str, str]
    body: Json
    number: int  # of the same question, from 0

    @property
    def question(self) -> int:
        """Return the number in "What number 7?"."""
        return int(re.search(r"What number (\d+)", json.dumps(self.body["messages"]))[1])


# What is done about a request: it writes to the handler's socket, or does not.
Action = Callable[["Handler", Asked], None]
Script = Callable[[Asked], Action]


def response(answer: Json, *, caption: str = "- A grey field.", think: str = "Read it.") -> str:
    """Return a well-formed response."""
    return (
        f"<caption>\n{caption}\n</caption>\n<think>\n{think}\n</think>\n"
        f"<answer>\n{answer}\n</answer>"
    )


def completion(text: Json, *, finish: str = "stop", usage: bool = True, **changes) -> Json:
    """Return a chat completion."""
    total = INPUT_TOKENS + OUTPUT_TOKENS
    counts = {
        "prompt_tokens": INPUT_TOKENS,
        "completion_tokens": OUTPUT_TOKENS,
        "total_tokens": total,
    }
    message = {"role": "assistant", "content": text}
    found = {
        "object": "chat.completion",
        "model": f"{MODEL}-001",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }
    return found | ({"usage": counts} if usage else {}) | changes


def say(text: Json, **options) -> Action:
    """Answer with a text; see `completion`."""
    return send(200, completion(text, **options))


def right(asked: Asked) -> Action:
    """Answer the question rightly: a script."""
    return say(response(asked.question))


def send(status: int, found: Json, headers: dict[str, str] | None = None) -> Action:
    """Send JSON, or bytes as they are."""
    data = found if isinstance(found, bytes) else json.dumps(found).encode()

    def act(handler: "Handler", asked: Asked) -> None:
        del asked
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return act


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Action:
    """Send an error as OpenAI words them."""
    return send(status, {"error": {"message": message, "type": "error"}}, headers)


def echo_key(status: int) -> Action:
    """Send an error that repeats the key it got."""

    def act(handler: "Handler", asked: Asked) -> None:
        error(status, f"wrong key: {asked.headers['Authorization']}")(handler, asked)

    return act


def hang(handler: "Handler", asked: Asked) -> None:
    """Say nothing until the test ends."""
    del asked
    handler.server.ending.wait(20)


def drip(handler: "Handler", asked: Asked) -> None:
    """Begin well, then send a byte now and then: every single wait of a reader is short."""
    del asked
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        if handler.server.ending.wait(0.05):
            return


def reset(handler: "Handler", asked: Asked) -> None:
    """Reset the connection."""
    del asked
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def hang_up(handler: "Handler", asked: Asked) -> None:
    """Close the connection without a word."""
    del asked
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut_off(handler: "Handler", asked: Asked) -> None:
    """Promise more bytes than are sent."""
    data = json.dumps(completion(response(asked.question))).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])


class Handler(http.server.BaseHTTPRequestHandler):
    """Do what the server's script says."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = self.server.enter(self.path, dict(self.headers), body)
        # A client that has given up is no error here.
        with contextlib.suppress(OSError):
            self.server.script(asked)(self, asked)

    def log_message(self, *arguments) -> None:
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    """Listen on a free port of this machine alone."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, script: Script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.ending = threading.Event()
        self.asked: list[Asked] = []
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def base_url(self) -> str:
        """Return the address to be configured."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def enter(self, path: str, headers: dict[str, str], body: Json) -> Asked:
        """Count a request."""
        with self._lock:
            name = json.dumps(body, sort_keys=True)
            number = self._numbers.get(name, 0)
            self._numbers[name] = number + 1
            self.asked.append(
                Asked(
                    seconds=time.monotonic(), path=path, headers=headers, body=body, number=number
                )
            )
            return self.asked[-1]

    def handle_error(self, request, client_address) -> None:
        """Say nothing of connections that broke."""


@contextlib.contextmanager
def serve(script: Script) -> Iterator[Server]:
    """Run a server in a thread."""
    server = Server(script)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        server.ending.set()
        server.shutdown()
        thread.join()
        server.server_close()
