"""Ask a chat endpoint over HTTP, whatever it does, and keep the key out of everything else.

Each request has a deadline for the whole of it. What may pass is tried again a bounded number of
times, after a wait that doubles and is never the same for two threads; where the endpoint says how
long to wait (`Retry-After`), all threads wait that long. Redirections are not followed, and proxies
of the environment are not used: the key goes to the host that was named and nowhere else.
"""

import collections
import contextlib
import dataclasses
import datetime
import email.utils
import enum
import http.client
import json
import math
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable

from prism_jax import errors
from prism_jax.teacher import reply

_LIMIT_BYTES = 64 << 20
_SHOWN_CHARS = 200
# Shorter ones are no secrets ("none"), and to blank them out would damage texts.
_SECRET_CHARS = 8
_HIDDEN = "[key]"
_PASSING = frozenset({408, 409, 425, 429})
# No request will fare better: the key, the credit, the address or the method is wrong.
_FATAL = frozenset({401, 402, 404, 405})


class Event(enum.StrEnum):
    """Name what became of one attempt."""

    REPLY = "reply"
    RATE_LIMITED = "rate_limited"
    SERVER_ERROR = "server_error"
    TIMEOUT = "timeout"
    CONNECTION = "connection"  # refused, reset, or ended too early
    MALFORMED = "malformed"  # not JSON
    NO_CHOICES = "no_choices"  # JSON without a text
    REFUSED = "refused"


class FailedError(Exception):
    """Say that a request failed as often as it may be tried."""


class RefusedError(Exception):
    """Say that the endpoint refuses this very request."""


class FatalError(Exception):
    """Say that no request can succeed now."""


class StoppedError(Exception):
    """Say that the job is stopping."""


class _PassingError(Exception):
    def __init__(self, event: Event, message: str, *, wait_seconds: float | None = None):
        super().__init__(message)
        self.event = event
        self.wait_seconds = wait_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """Say how long and how often an endpoint is tried."""

    deadline_seconds: float  # of one attempt, from connecting to the last byte
    max_attempts: int  # of one request
    backoff_seconds: float  # before the second attempt; doubles from there on
    max_wait_seconds: float  # between two attempts; one that asks for more ends the job


def read_key(variable: str) -> str | None:
    """Return the key in an environment variable, None where no variable is named.

    No message holds the value of either: a key may have been put in place of the name.

    Raises:
      InputError: no such variable, or its value cannot be a key.
    """
    if not variable:
        return None
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise errors.InputError(
            "config.teacher.endpoint.api_key_env must name a variable, in capital letters"
        )
    value = os.environ.get(variable, "").strip()
    if not value:
        raise errors.InputError(
            "the environment variable that config.teacher.endpoint.api_key_env names is not set"
        )
    if not value.isascii() or not value.isprintable() or " " in value:
        raise errors.InputError(f"the value of {variable} must be one line of plain characters")
    return value


def problem_of(base_url: str, *, has_key: bool) -> str | None:
    """Return what is wrong with an address, which is not repeated: it may hold a secret."""
    try:
        found = urllib.parse.urlsplit(base_url)
        host, _ = found.hostname, found.port
    except ValueError:
        return "must be http[s]://HOST[:PORT]/PATH"
    if found.scheme not in ("http", "https") or not host or not base_url.isascii():
        return "must be http[s]://HOST[:PORT]/PATH"
    if found.username is not None or found.query or found.fragment:
        return "must hold no user, query or fragment: a key comes from the environment alone"
    if has_key and found.scheme == "http" and host not in ("localhost", "127.0.0.1", "::1"):
        return "must begin with https:// where a key is sent to another machine"
    return None


class Client:
    """Ask one endpoint. Safe to use from any thread.

    Args:
      base_url: to which `/chat/completions` is added.
      key: sent as a bearer token; None: none is.
      stop: set from outside, it ends every wait.
    """

    def __init__(
        self, base_url: str, *, key: str | None, patience: Patience, stop: threading.Event
    ):
        address = urllib.parse.urlsplit(base_url)
        self._host, self._port = address.hostname, address.port
        self._path = address.path.rstrip("/") + "/chat/completions"
        self._tls = ssl.create_default_context() if address.scheme == "https" else None
        self._key = key
        self._patience = patience
        self._stop = stop
        self._lock = threading.Lock()
        self._counts: collections.Counter[Event] = collections.Counter()
        self._resume_at = -math.inf  # by the monotonic clock
        self._random = random.Random()

    def counts(self) -> dict[str, int]:
        """Return how many attempts ended in which way."""
        with self._lock:
            return {event.value: self._counts[event] for event in Event}

    def ask(self, body: bytes, *, unusable: Callable[[reply.Usage], None]) -> reply.Reply:
        """Return the reply to a request.

        Args:
          body: JSON.
          unusable: is told what an attempt cost that brought no text.

        Raises:
          FailedError: every attempt failed.
          RefusedError: the endpoint refuses this request.
          FatalError: it would refuse any.
          StoppedError: the job stops.
        """
        told = ""
        for attempt in range(1, self._patience.max_attempts + 1):
            self._wait_for_turn()
            try:
                found = self._attempt(body, unusable)
            except _PassingError as error:
                self._hold_all(error.wait_seconds)
                self._count(error.event)
                told = f"{error.event.value}: {error}"
                self._wait_before(attempt + 1, error.wait_seconds)
                continue
            except RefusedError:
                self._count(Event.REFUSED)
                raise
            self._count(Event.REPLY)
            return found
        raise FailedError(f"{told} (attempt {self._patience.max_attempts})")

    def _attempt(self, body: bytes, unusable: Callable[[reply.Usage], None]) -> reply.Reply:
        status, retry_after, data = self._exchange(body)
        if status == 200:
            try:
                found = reply.parse(data)
            except reply.UnusableError as error:
                if error.usage is not None:
                    unusable(error.usage)
                event = Event.NO_CHOICES if error.is_json else Event.MALFORMED
                raise _PassingError(event, self._clean(str(error))) from None
            model = None if found.model is None else self._clean(found.model)
            return dataclasses.replace(found, text=self._hide(found.text), model=model)
        # What is said about a wrong key may hold pieces of it.
        told = f"HTTP {status}" + ("" if status in (401, 403) else self._words_of(data))
        if status in _PASSING or status >= 500:
            event = Event.RATE_LIMITED if status == 429 else Event.SERVER_ERROR
            seconds = retry_after_seconds(retry_after, datetime.datetime.now(datetime.UTC))
            if seconds is not None and seconds > self._patience.max_wait_seconds:
                self._count(event)
                raise FatalError(
                    f"{told}: the endpoint asks to wait {seconds:.0f} s, "
                    f"max_wait_seconds is {self._patience.max_wait_seconds:g}"
                )
            raise _PassingError(event, told, wait_seconds=seconds)
        if status in _FATAL or status < 400:
            self._count(Event.REFUSED)
            raise FatalError(told)
        raise RefusedError(told)

    def _exchange(self, body: bytes) -> tuple[int, str | None, bytes]:
        """Send a request once and return status, `Retry-After` and body."""
        seconds = self._patience.deadline_seconds
        begun = time.monotonic()
        connection = self._connection(seconds)
        expired = threading.Event()
        timer = None
        try:
            connection.connect()
            left = max(0.0, begun + seconds - time.monotonic())
            # A socket's own timeout begins anew with every byte; this one does not.
            timer = threading.Timer(left, _expire, (connection.sock, expired))
            timer.daemon = True
            timer.start()
            connection.request("POST", self._path, body=body, headers=self._headers())
            response = connection.getresponse()
            data = response.read(_LIMIT_BYTES + 1)
        except UnicodeError as error:
            raise FatalError(self._clean(f"the endpoint's address: {error}")) from None
        except ssl.SSLCertVerificationError as error:
            raise FatalError(self._clean(f"the endpoint's certificate: {error}")) from None
        # The original is dropped: only what was cleaned goes on.
        except (OSError, http.client.HTTPException) as error:
            if expired.is_set() or isinstance(error, TimeoutError):
                raise _PassingError(Event.TIMEOUT, f"no reply within {seconds:g} s") from None
            told = self._clean(f"{type(error).__name__}: {error}")
            raise _PassingError(Event.CONNECTION, told) from None
        finally:
            if timer is not None:
                timer.cancel()
            connection.close()
        if expired.is_set():
            raise _PassingError(Event.TIMEOUT, f"no reply within {seconds:g} s")
        if len(data) > _LIMIT_BYTES:
            raise _PassingError(Event.MALFORMED, f"more than {_LIMIT_BYTES} bytes")
        if response.length:
            raise _PassingError(Event.CONNECTION, f"{response.length} bytes are missing")
        return response.status, response.headers.get("Retry-After"), data

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=seconds)
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=seconds, context=self._tls
        )

    def _headers(self) -> dict[str, str]:
        found = {"Content-Type": "application/json", "Accept": "application/json"}
        return found if self._key is None else found | {"Authorization": f"Bearer {self._key}"}

    def _wait_for_turn(self) -> None:
        """Wait as long as the endpoint asked all of us to."""
        while True:
            with self._lock:
                left = self._resume_at - time.monotonic()
            if self._stop.wait(max(0.0, left)):
                raise StoppedError
            if left <= 0:
                return

    def _hold_all(self, seconds: float | None) -> None:
        """Have no thread begin an attempt for so long."""
        if seconds is not None:
            with self._lock:
                self._resume_at = max(self._resume_at, time.monotonic() + seconds)

    def _wait_before(self, attempt: int, asked_seconds: float | None) -> None:
        """Wait before an attempt, if it is one that may be made."""
        patience = self._patience
        if attempt > patience.max_attempts:
            return
        if asked_seconds is not None:
            # All threads wait for the same moment: spread them behind it.
            seconds = asked_seconds + patience.backoff_seconds * self._random.random()
        else:
            doubled = patience.backoff_seconds * 2.0 ** (attempt - 2)
            seconds = min(patience.max_wait_seconds, doubled) * self._random.uniform(0.5, 1.0)
        if self._stop.wait(seconds):
            raise StoppedError

    def _count(self, event: Event) -> None:
        with self._lock:
            self._counts[event] += 1

    def _words_of(self, data: bytes) -> str:
        """Return the endpoint's own words about an error, to be put behind the status."""
        try:
            message = reply.message_of(json.loads(data))
        except (ValueError, RecursionError):
            message = None
        return "" if message is None else f": {self._clean(message)}"

    def _clean(self, text: str) -> str:
        """Return one short line without the key."""
        return self._hide(" ".join(self._hide(text).split()))[:_SHOWN_CHARS]

    def _hide(self, text: str) -> str:
        if self._key is None or len(self._key) < _SECRET_CHARS:
            return text
        return text.replace(self._key, _HIDDEN)


def _expire(sock: socket.socket, expired: threading.Event) -> None:
    expired.set()
    # Of the plain socket: TLS must not be taken from under the thread that reads.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def retry_after_seconds(value: str | None, now: datetime.datetime) -> float | None:
    """Return the wait that a `Retry-After` header asks for; None where it asks for nothing.

    Source: RFC 9110 section 10.2.3: a number of seconds or a date.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
            if date.tzinfo is None:
                date = date.replace(tzinfo=datetime.UTC)
            seconds = (date - now).total_seconds()
        # Whatever the parser makes of text that is no date, or of one that no clock shows.
        except (ValueError, OverflowError, TypeError, LookupError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
