"""An HTTP client for a chat endpoint that may misbehave, and that keeps the key secret.

Each attempt has a deadline. Transient failures are retried a bounded number of times, after an
exponential and randomised wait; if the endpoint sends `Retry-After`, all threads wait that long.
Redirections are not followed and proxies of the environment are not used: the key is sent to the
named host and nowhere else.
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
# Shorter keys ("none") are not secrets, and hiding them would damage texts.
_SECRET_CHARS = 8
_HIDDEN = "[key]"
_PASSING = frozenset({408, 409, 425, 429})
# All requests would fail: the key, the credit, the address or the method is wrong.
_FATAL = frozenset({401, 402, 404, 405})


class Event(enum.StrEnum):
    """The outcomes of an attempt."""

    REPLY = "reply"
    RATE_LIMITED = "rate_limited"
    SERVER_ERROR = "server_error"
    TIMEOUT = "timeout"
    CONNECTION = "connection"  # refused, reset, or ended too early
    MALFORMED = "malformed"  # not JSON
    NO_CHOICES = "no_choices"  # JSON without a text
    REFUSED = "refused"


class FailedError(Exception):
    """The failure of all attempts of a request."""


class RefusedError(Exception):
    """The refusal of a request by the endpoint."""


class FatalError(Exception):
    """A failure that all requests would meet."""


class StoppedError(Exception):
    """The end of the job during a request."""


class _PassingError(Exception):
    def __init__(self, event: Event, message: str, *, wait_seconds: float | None = None):
        super().__init__(message)
        self.event = event
        self.wait_seconds = wait_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """Limits on the attempts and the waits of a request."""

    deadline_seconds: float  # of an attempt, from connecting to the last byte
    max_attempts: int  # of a request
    backoff_seconds: float  # before the second attempt; doubles with each further one
    max_wait_seconds: float  # between attempts; a longer `Retry-After` ends the job


def read_key(variable: str, *, place: str) -> str | None:
    """Return the key in an environment variable, None if no variable is named.

    No message quotes the variable or the key: a user may pass the key in place of the name.

    Args:
      place: the endpoint's section in the configuration, for messages.

    Raises:
      InputError: no such variable, or its value cannot be a key.
    """
    if not variable:
        return None
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise errors.InputError(f"{place}.api_key_env must name a variable, in capital letters")
    value = os.environ.get(variable, "").strip()
    if not value:
        raise errors.InputError(
            f"the environment variable that {place}.api_key_env names is not set"
        )
    if not value.isascii() or not value.isprintable() or " " in value:
        raise errors.InputError(f"the value of {variable} must be one line of plain characters")
    return value


def problem_of(base_url: str, *, has_key: bool) -> str | None:
    """Return the problem with an address, without quoting it: it may hold a secret."""
    try:
        parts = urllib.parse.urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "must be http[s]://HOST[:PORT]/PATH"
    if parts.scheme not in ("http", "https") or not host or not base_url.isascii():
        return "must be http[s]://HOST[:PORT]/PATH"
    if parts.username is not None or parts.query or parts.fragment:
        return "must hold no user, query or fragment: a key comes from the environment alone"
    if has_key and parts.scheme == "http" and host not in ("localhost", "127.0.0.1", "::1"):
        return "must begin with https:// where a key is sent to another machine"
    return None


class Client:
    """A client of an endpoint. Thread-safe.

    Args:
      base_url: the address without `/chat/completions`.
      key: sent as a bearer token; None: no token.
      stop: ends all waits when it is set.
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
        """Return the number of attempts by outcome."""
        with self._lock:
            return {event.value: self._counts[event] for event in Event}

    def ask(self, body: bytes, *, unusable: Callable[[reply.Usage], None]) -> reply.Reply:
        """Return the reply to a request.

        Args:
          body: JSON.
          unusable: called with the usage of each reply without text.

        Raises:
          FailedError: all attempts failed.
          RefusedError: the endpoint refuses this request.
          FatalError: it would refuse any request.
          StoppedError: the job stops.
        """
        failure = ""
        for attempt in range(1, self._patience.max_attempts + 1):
            self._wait_for_turn()
            try:
                received = self._attempt(body, unusable)
            except _PassingError as error:
                self._hold_all(error.wait_seconds)
                self._count(error.event)
                failure = f"{error.event.value}: {error}"
                self._wait_before(attempt + 1, error.wait_seconds)
                continue
            except RefusedError:
                self._count(Event.REFUSED)
                raise
            self._count(Event.REPLY)
            return received
        raise FailedError(f"{failure} (attempt {self._patience.max_attempts})")

    def _attempt(self, body: bytes, unusable: Callable[[reply.Usage], None]) -> reply.Reply:
        status, retry_after, data = self._exchange(body)
        if status == 200:
            try:
                received = reply.parse(data)
            except reply.UnusableError as error:
                if error.usage is not None:
                    unusable(error.usage)
                event = Event.NO_CHOICES if error.is_json else Event.MALFORMED
                raise _PassingError(event, self._clean(str(error))) from None
            model = None if received.model is None else self._clean(received.model)
            return dataclasses.replace(received, text=self._hide(received.text), model=model)
        # The message about a wrong key may quote pieces of it.
        message = f"HTTP {status}" + ("" if status in (401, 403) else self._error_suffix(data))
        if status in _PASSING or status >= 500:
            event = Event.RATE_LIMITED if status == 429 else Event.SERVER_ERROR
            seconds = retry_after_seconds(retry_after, datetime.datetime.now(datetime.UTC))
            if seconds is not None and seconds > self._patience.max_wait_seconds:
                self._count(event)
                raise FatalError(
                    f"{message}: the endpoint asks to wait {seconds:.0f} s, "
                    f"max_wait_seconds is {self._patience.max_wait_seconds:g}"
                )
            raise _PassingError(event, message, wait_seconds=seconds)
        if status in _FATAL or status < 400:
            self._count(Event.REFUSED)
            raise FatalError(message)
        raise RefusedError(message)

    def _exchange(self, body: bytes) -> tuple[int, str | None, bytes]:
        """Send a request once and return status, `Retry-After` and body."""
        seconds = self._patience.deadline_seconds
        begun = time.monotonic()
        connection = self._connection(seconds)
        expired = threading.Event()
        timer = None
        try:
            connection.connect()
            left_seconds = max(0.0, begun + seconds - time.monotonic())
            # The socket's timeout starts again with each byte received; this timer does not.
            timer = threading.Timer(left_seconds, _expire, (connection.sock, expired))
            timer.daemon = True
            timer.start()
            connection.request("POST", self._path, body=body, headers=self._headers())
            response = connection.getresponse()
            data = response.read(_LIMIT_BYTES + 1)
        except UnicodeError as error:
            raise FatalError(self._clean(f"the endpoint's address: {error}")) from None
        except ssl.SSLCertVerificationError as error:
            raise FatalError(self._clean(f"the endpoint's certificate: {error}")) from None
        # `from None`: the original exception may hold the key.
        except (OSError, http.client.HTTPException) as error:
            if expired.is_set() or isinstance(error, TimeoutError):
                raise _PassingError(Event.TIMEOUT, f"no reply within {seconds:g} s") from None
            message = self._clean(f"{type(error).__name__}: {error}")
            raise _PassingError(Event.CONNECTION, message) from None
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
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        return headers if self._key is None else headers | {"Authorization": f"Bearer {self._key}"}

    def _wait_for_turn(self) -> None:
        """Wait until the pause that `_hold_all` set for all threads is over."""
        while True:
            with self._lock:
                left_seconds = self._resume_at - time.monotonic()
            if self._stop.wait(max(0.0, left_seconds)):
                raise StoppedError
            if left_seconds <= 0:
                return

    def _hold_all(self, seconds: float | None) -> None:
        """Keep all threads from starting an attempt for some time."""
        if seconds is not None:
            with self._lock:
                self._resume_at = max(self._resume_at, time.monotonic() + seconds)

    def _wait_before(self, attempt: int, retry_after: float | None) -> None:
        """Wait before an attempt, unless it is beyond the last."""
        patience = self._patience
        if attempt > patience.max_attempts:
            return
        if retry_after is not None:
            # All threads wait for the same moment: spread them after it.
            seconds = retry_after + patience.backoff_seconds * self._random.random()
        else:
            doubled = patience.backoff_seconds * 2.0 ** (attempt - 2)
            seconds = min(patience.max_wait_seconds, doubled) * self._random.uniform(0.5, 1.0)
        if self._stop.wait(seconds):
            raise StoppedError

    def _count(self, event: Event) -> None:
        with self._lock:
            self._counts[event] += 1

    def _error_suffix(self, data: bytes) -> str:
        """Return the endpoint's error message as a suffix to the status."""
        try:
            message = reply.message_of(json.loads(data))
        except (ValueError, RecursionError):
            message = None
        return "" if message is None else f": {self._clean(message)}"

    def _clean(self, text: str) -> str:
        """Return a short line without the key."""
        return self._hide(" ".join(self._hide(text).split()))[:_SHOWN_CHARS]

    def _hide(self, text: str) -> str:
        if self._key is None or len(self._key) < _SECRET_CHARS:
            return text
        return text.replace(self._key, _HIDDEN)


def _expire(sock: socket.socket, expired: threading.Event) -> None:
    expired.set()
    # Shut down the plain socket: closing TLS here would race with the reading thread.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def retry_after_seconds(value: str | None, now: datetime.datetime) -> float | None:
    """Return the wait in a `Retry-After` header; None if there is none or it is not valid.

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
        # The parser raises various errors for text that is not a date.
        except (ValueError, OverflowError, TypeError, LookupError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
