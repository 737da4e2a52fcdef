"""Wait until every process of a job is there, before the start of JAX, which waits in silence.

Process 0 listens; each other process connects, says who it is, and waits for a verdict:

    process 1 --- {"process": 1, "of": 4, "job": …, "options": …} ---> process 0
    process 1 <----------------- {"refused": null, "gave_up": false} ------------------ process 0

The verdict comes when all are there, or as soon as something does not agree: then every process
ends with the same line. Messages are short lines of JSON; whatever else connects is ignored.
"""

import contextlib
import dataclasses
import errno
import json
import socket
import sys
import time
from typing import Any

from prism_jax import errors

EXIT_CODE = 42  # a worker was missing; launchers start the job again
_MOST_BYTES = 1 << 18
_GREETING_SECONDS = 5.0
_RETRY_SECONDS = 0.5
_LINGER_SECONDS = 30.0
_MAGIC = "prism_jax roll call"


class MissingWorkers(SystemExit):
    """The end of a program whose processes did not all come."""

    def __init__(self, message: str):
        super().__init__(EXIT_CODE)
        self.message = message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caller:
    """A process of the job, as it presents itself."""

    process: int
    of: int  # number of processes
    job: str  # another job on the same hosts has another name; may be empty
    version: str  # of this program
    options: dict[str, str]  # of the command line, each with a digest of its values


_GREETING = {field.name for field in dataclasses.fields(Caller)}


class _Patience:
    """The clock of one wait: notices at an interval, an end at the limit."""

    def __init__(self, *, notice_seconds: float, limit_seconds: float):
        self._begun = time.monotonic()
        self._notice_seconds = notice_seconds
        self._limit_seconds = limit_seconds
        self._num_notices = 0

    def check(self, missing: str) -> None:
        """Print the missing processes when a notice is due; leave the program at the limit."""
        waited = time.monotonic() - self._begun
        if waited > self._limit_seconds:
            message = f"error: gave up after {waited:.0f} s: {missing}"
            print(message, file=sys.stderr, flush=True)
            raise MissingWorkers(message)
        if waited > self._notice_seconds * (self._num_notices + 1):
            self._num_notices += 1
            print(f"after {waited:.0f} s: {missing}", file=sys.stderr, flush=True)


def hold(
    caller: Caller, *, host: str, port: int, notice_seconds: float, limit_seconds: float
) -> None:
    """Return when all processes of the job are there.

    Args:
      host: of process 0.
      notice_seconds: time between two lines that name the missing processes.
      limit_seconds: how long to wait for them.

    Raises:
      InputError: two processes do not agree, or have the same number; raised on all of them.
      MissingWorkers: the limit is reached.
    """
    patience = _Patience(notice_seconds=notice_seconds, limit_seconds=limit_seconds)
    if caller.process == 0:
        _Desk(caller, patience).call(port)
    else:
        _answer(caller, host, port, patience)


class _Desk:
    """The side of process 0: the processes that came, and the verdict."""

    def __init__(self, caller: Caller, patience: _Patience):
        self._caller = caller
        self._patience = patience
        self._peers: dict[int, socket.socket] = {}
        self._doubles: list[socket.socket] = []  # their number is taken

    def call(self, port: int) -> None:
        """Collect the others and send them the verdict."""
        with _listen(port, self._patience) as server:
            server.settimeout(_RETRY_SECONDS)
            try:
                refused = self._collect(server)
            except MissingWorkers as error:
                self._dismiss(error.message, gave_up=True)
                raise
            if refused is not None:
                self._linger(server)
            self._dismiss(refused, gave_up=False)
        if refused is not None:
            raise errors.InputError(refused)

    def _collect(self, server: socket.socket) -> str | None:
        """Wait until all others are there; return the first disagreement."""
        while len(self._peers) < self._caller.of - 1:
            missing = [i for i in range(1, self._caller.of) if i not in self._peers]
            self._patience.check(_missing(missing, self._caller.of))
            with contextlib.suppress(TimeoutError):
                refused = self._admit(*server.accept())
                if refused is not None:
                    return refused
            for number in [i for i, peer in self._peers.items() if not _is_open(peer)]:
                self._peers.pop(number).close()
        return None

    def _admit(self, peer: socket.socket, address: tuple) -> str | None:
        """Add the process that connected; return a disagreement."""
        other = _read(peer, _GREETING_SECONDS)
        if other is None or not other.keys() >= _GREETING or other["job"] != self._caller.job:
            peer.close()  # some other program, or another job
            return None
        number = other["process"]
        if number == 0 or (number in self._peers and _is_open(self._peers[number])):
            self._doubles.append(peer)
            return f"two processes have the number {number}, the second one at {address[0]}"
        if number in self._peers:
            self._peers.pop(number).close()
        self._peers[number] = peer
        return _difference(self._caller, other)

    def _linger(self, server: socket.socket) -> None:
        """Wait a while for those that must still hear of the refusal."""
        deadline = time.monotonic() + _LINGER_SECONDS
        while time.monotonic() < deadline:
            if len(self._peers) + len(self._doubles) >= self._caller.of - 1:
                return
            with contextlib.suppress(TimeoutError):
                self._admit(*server.accept())

    def _dismiss(self, refused: str | None, *, gave_up: bool) -> None:
        """Send the verdict and let the other sides close first."""
        verdict = {"magic": _MAGIC, "refused": refused, "gave_up": gave_up}
        peers = [*self._peers.values(), *self._doubles]
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.sendall(json.dumps(verdict).encode() + b"\n")
        for peer in peers:
            with contextlib.suppress(OSError), peer:
                peer.settimeout(_GREETING_SECONDS)
                peer.recv(1)


def _missing(missing: list[int], of: int) -> str:
    """Return the line about processes that did not come."""
    some = ", ".join(str(i) for i in missing[:16]) + (", …" if len(missing) > 16 else "")
    noun = "process" if len(missing) == 1 else "processes"
    return (
        f"process 0 waits for {len(missing)} of {of} processes: {noun} {some} did not connect; "
        "the same command must run on every worker"
    )


def _listen(port: int, patience: _Patience) -> socket.socket:
    """Listen on the port, which a process of an earlier start may still have for a while."""
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
                )
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise errors.InputError(f"port {port} of this host: {error.strerror}") from None
        patience.check(f"port {port} of this host is taken; is an earlier start still alive?")
        time.sleep(_RETRY_SECONDS)


def _difference(caller: Caller, other: dict[str, Any]) -> str | None:
    """Return the difference between the starts of a process and of process 0."""
    name = f"process {other['process']}"
    for field, noun in (("of", "processes"), ("version", "version")):
        mine = dataclasses.asdict(caller)[field]
        if other[field] != mine:
            return f"{name} was started with {noun} {other[field]}, process 0 with {mine}"
    options = caller.options.keys() | other["options"].keys()
    wrong = sorted(o for o in options if caller.options.get(o) != other["options"].get(o))
    if wrong:
        return f"{name} was started with another {', '.join(wrong[:5])} than process 0"
    return None


def _answer(caller: Caller, host: str, port: int, patience: _Patience) -> None:
    """Connect to process 0 and wait for its verdict."""
    greeting = json.dumps({"magic": _MAGIC} | dataclasses.asdict(caller)).encode() + b"\n"
    missing = (
        f"process {caller.process} of {caller.of} cannot reach process 0 at {host}:{port}; the "
        "same command must run on every worker, and a firewall must let the port through"
    )
    while True:
        patience.check(missing)
        try:
            with socket.create_connection((host, port), timeout=_GREETING_SECONDS) as peer:
                peer.sendall(greeting)
                verdict = _await(peer, caller, patience)
        except OSError:
            verdict = None
        if verdict is not None:
            if verdict["gave_up"]:
                print(verdict["refused"], file=sys.stderr, flush=True)
                raise MissingWorkers(verdict["refused"])
            if verdict["refused"] is not None:
                raise errors.InputError(verdict["refused"])
            return
        time.sleep(_RETRY_SECONDS)


def _await(peer: socket.socket, caller: Caller, patience: _Patience) -> dict[str, Any] | None:
    """Return the verdict; None when process 0 is gone."""
    while True:
        patience.check(f"process {caller.process} of {caller.of} waits: process 0 lacks others")
        peer.settimeout(_RETRY_SECONDS)
        try:
            if not peer.recv(1, socket.MSG_PEEK):
                return None
        except TimeoutError:
            continue
        return _read(peer, _GREETING_SECONDS)


def _read(peer: socket.socket, seconds: float) -> dict[str, Any] | None:
    """Return a message of this protocol; None for anything else."""
    line, deadline = b"", time.monotonic() + seconds
    try:
        while not line.endswith(b"\n") and len(line) < _MOST_BYTES:
            peer.settimeout(max(deadline - time.monotonic(), 0.01))
            part = peer.recv(1 << 16)
            if not part:
                return None
            line += part
        message = json.loads(line)
    except (OSError, ValueError):
        return None
    is_ours = isinstance(message, dict) and message.get("magic") == _MAGIC
    return message if is_ours else None


def _is_open(peer: socket.socket) -> bool:
    """Return whether the other side is still there."""
    peer.setblocking(False)
    try:
        return bool(peer.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False
