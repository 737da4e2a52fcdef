"""A headless Chromium over its debugging pipe: open a page, run JavaScript, see what it logs."""

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    """Return the first of the programs that is on the path, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


_DEADLINE_SECONDS = 60.0


class Browser:
    """Speak the DevTools protocol, one JSON message and a zero byte at a time."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from = to_browser, from_browser
        self._buffer = b""
        self._last = 0
        self._session: str | None = None
        self.logged: list[str] = []  # errors and warnings of the page, and what it asked the net
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def open(self, path: pathlib.Path, *, width: int, height: int, dark: bool = False) -> None:
        """Open a file in a window of this size and wait until it is drawn."""
        self.logged.clear()
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._ask("Page.navigate", url=path.absolute().as_uri())
        deadline = time.monotonic() + _DEADLINE_SECONDS
        loaded = (
            f"document.readyState + location.pathname === 'complete' + {str(path.absolute())!r}"
        )
        while not self.run(loaded):
            assert time.monotonic() < deadline, f"{path} was not loaded"
        # Two frames: the layout is done.
        self.run("new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f)))")

    def run(self, script: str) -> Any:
        """Return the value of an expression; a promise is waited for."""
        told = self._ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def screenshot(self, path: pathlib.Path) -> None:
        """Write the whole page as PNG."""
        told = self._ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))

    def _ask(self, method: str, **params: Any) -> Any:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            told = self._read()
            if told.get("id") == self._last:
                assert "error" not in told, f"{method}: {told['error']}"
                return told["result"]
            self._note(told)

    def _note(self, event: dict) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.logged.append(json.dumps(params))
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("data:", "file:", "about:")):
                self.logged.append(url)

    def _read(self) -> dict:
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], deadline - time.monotonic())
            assert ready, "Chromium does not answer"
            read = os.read(self._from, 1 << 20)
            assert read, "Chromium has ended"
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def start(program: str, profile: pathlib.Path) -> Iterator[Browser]:
    """Yield a browser with a fresh profile; it ends with the context."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()

    # Chromium reads commands from descriptor 3 and writes to 4; a shell puts the pipes there.
    command = (
        f'exec "{program}" --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage '
        f'--no-first-run --user-data-dir="{profile}" --remote-debugging-pipe about:blank '
        f"3<&{to_read} 4>&{from_write}"
    )
    process = subprocess.Popen(
        ["/bin/bash", "-c", command],
        pass_fds=(to_read, from_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(from_write)
    try:
        yield Browser(to_write, from_read)
    finally:
        process.terminate()
        process.wait(timeout=30)
        os.close(to_write)
        os.close(from_read)
