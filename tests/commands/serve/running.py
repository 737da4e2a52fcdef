"""A server as users start it: a process of its own, with tiny models, a key and a picture host."""

import http.server
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import openai

from tests import tiny_checkpoint

KEY = "a-key-for-tests"
SLOTS, QUEUE, RESPONSES, TOKENS = 8, 248, 16, 48
LIMIT_PIXELS = 40_000
BODY_BYTES = 1 << 20
_ROOT = pathlib.Path(__file__).parents[3]
_START_SECONDS = 600


class Server:
    """A server process; one is enough for all tests."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        tiny_checkpoint.write(folder / "policy")
        tiny_checkpoint.write(folder / "score", num_experts=4, score=True)
        tiny_checkpoint.picture(folder, "a.png", (96, 64))
        tiny_checkpoint.picture(folder, "large.png", (300, 200))
        (folder / "key").write_text(KEY + "\n")
        self.pictures = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
        self.pictures.data = (folder / "a.png").read_bytes()
        threading.Thread(target=self.pictures.serve_forever, daemon=True).start()
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self._command(), cwd=_ROOT, stderr=log)
        try:
            self.url = self._url()
        except BaseException:
            self.stop()
            raise

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "prism_jax", "serve"),
            f"--model={self.folder / 'policy'}",
            f"--discriminator={self.folder / 'score'}",
            f"--api_key_file={self.folder / 'key'}",
            f"--image_host={self.picture_host}",
            f"--num_slots={SLOTS}",
            f"--max_queue={QUEUE}",
            f"--max_responses={RESPONSES}",
            f"--max_new_tokens={TOKENS}",
            f"--limit_image_pixels={LIMIT_PIXELS}",
            *("--port=0", "--max_prompt_tokens=128", "--max_images=2", "--chunk_tokens=4"),
            *("--max_body_mebibytes=1", "--body_seconds=2"),
        ]

    def _url(self) -> str:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            line = next((x for x in self.lines() if x.startswith("serving ")), None)
            if line is not None:
                return line.split(" on ")[1].removesuffix("/v1")
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError("\n".join(self.lines()))

    @property
    def picture_host(self) -> str:
        """Return the only host that pictures are fetched from."""
        return f"127.0.0.1:{self.pictures.server_port}"

    @property
    def address(self) -> tuple[str, int]:
        """Return where the server listens."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def lines(self) -> list[str]:
        """Return what the server has said."""
        return self.log.read_text(errors="replace").splitlines()

    def client(self) -> openai.OpenAI:
        """Return the official client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)

    def post(self, route: str, content, **headers: str) -> httpx.Response:
        """Send a body that the official client would not send."""
        given = {"authorization": f"Bearer {KEY}"} | headers
        return httpx.post(f"{self.url}{route}", content=content, headers=given, timeout=120)

    def metrics(self) -> dict[str, float]:
        """Return the figures without their help."""
        lines = httpx.get(f"{self.url}/metrics", timeout=120).text.splitlines()
        return {
            name: float(value)
            for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))
        }

    def wait_until_idle(self) -> dict[str, float]:
        """Wait until no response is drawn or waits; return the figures."""
        deadline = time.monotonic() + 60
        names = ("running_responses", "waiting_responses", "open_requests")
        while time.monotonic() < deadline:
            figures = self.metrics()
            if not any(figures[f"prism_jax_{name}"] for name in names):
                return figures
            time.sleep(0.05)
        raise AssertionError(figures)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the process; return its exit code."""
        self.pictures.shutdown()
        self.process.send_signal(number)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


class _Pictures(http.server.BaseHTTPRequestHandler):
    """A host with one picture, and with an address that leads to another."""

    def do_GET(self) -> None:
        """Send the picture."""
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("location", "/a.png")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.data)

    def log_message(self, *args) -> None:
        """Print nothing."""


def servers(folder: pathlib.Path) -> Iterator[Server]:
    """Yield a server; it is stopped where no test has done so."""
    os.makedirs(folder, exist_ok=True)
    server = Server(folder)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
