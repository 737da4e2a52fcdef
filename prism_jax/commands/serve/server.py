"""The server's life: models, first compilations, requests, and the end by a signal."""

import argparse
import asyncio
import concurrent.futures
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

import uvicorn
from uvicorn import config as uvicorn_config

from prism_jax import errors
from prism_jax.commands.serve import app as app_lib
from prism_jax.commands.serve import exchange, measures, opened
from prism_jax.commands.serve.sampler import Sampler

STOPPED = 143  # 128 + SIGTERM
_KEEP_ALIVE_SECONDS = 30
# A client that takes nothing for so long is no longer there; the system closes its connection.
_UNREAD_SECONDS = 60
# Connections beyond the requests that have room: clients that keep theirs open, and refusals.
_SPARE_CONNECTIONS = 512


class _Server(uvicorn.Server):
    """Leaves the signals to `serve`, which has to close the slots behind the last request."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(args: argparse.Namespace, key: bytes | None, say: Callable[[str], None]) -> None:
    """Serve until a signal comes.

    Raises:
      SystemExit: SIGTERM came, and all requests were answered or `--grace_seconds` were over.
    """
    # Before the models are loaded, which takes minutes.
    with contextlib.closing(listener_of(args.host, args.port)) as listener:
        policy = None if args.model is None else opened.Policy.open(args, say)
        with concurrent.futures.ThreadPoolExecutor(args.num_threads, "encoder") as threads:
            score = None
            if args.discriminator is not None:
                score = opened.open_score(args, threads, say)
            life = Life(args, key, policy, score, threads, say)
            stopped_by = asyncio.run(life.serve(listener))
            if score is not None:
                score.close()
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(STOPPED)


class Life:
    """One server from its first compilation to its end."""

    def __init__(
        self,
        args: argparse.Namespace,
        key: bytes | None,
        policy: "opened.Policy | None",
        score: exchange.Work | None,
        threads: concurrent.futures.Executor,
        say: Callable[[str], None],
    ):
        self._args, self._policy, self._score, self._threads = args, policy, score, threads
        self._say = say
        self._counted = measures.Measures()
        rules = exchange.Rules(
            key=key,
            limit_bytes=args.max_body_mebibytes << 20,
            body_seconds=args.body_seconds,
            most_open=args.num_slots + args.max_queue,
        )
        self._front = exchange.Front(rules, self._counted)
        self._server: _Server | None = None
        self._stopped_by: signal.Signals | None = None
        self._failure: BaseException | None = None

    async def serve(self, listener: socket.socket) -> signal.Signals:
        """Serve; return the signal that ended it."""
        args, sampler = self._args, None
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop, number)
        works: dict[str, exchange.Work] = {}
        try:
            if self._policy is not None:
                sampler = Sampler(
                    self._policy.session,
                    most_waiting=args.max_queue,
                    group_responses=args.group_responses,
                    on_failure=self._fail,
                )
                works["chat/completions"] = self._policy.chat(
                    args, sampler, self._counted, self._threads
                )
                self._counted.watch(sampler)
                self._front.retry_seconds = sampler.retry_seconds
                await self._warm_up(self._policy, sampler)
            if self._score is not None:
                works["score"] = self._score
            if self._stopped_by is None and self._failure is None:
                await self._listen(listener, works)
        except Exception:
            # Where the sampler has failed, its error says why.
            if self._failure is None:
                raise
        finally:
            if sampler is not None:
                await sampler.close()
        if self._failure is not None:
            raise self._failure
        assert self._stopped_by is not None, "a server ends by a signal"
        return self._stopped_by

    async def _warm_up(self, policy: "opened.Policy", sampler: Sampler) -> None:
        if self._args.warm_up == "none":
            return
        begun = time.perf_counter()
        await policy.warm_up(sampler)
        self._say(f"compiled in {time.perf_counter() - begun:.1f} s")

    async def _listen(self, listener: socket.socket, works: dict[str, exchange.Work]) -> None:
        names = {
            "chat/completions": self._args.name,
            "score": opened.discriminator_name(self._args),
        }
        models = [
            {"id": names[route], "object": "model", "created": int(time.time()), "owned_by": "user"}
            for route in works
        ]
        app = app_lib.make(
            self._front,
            self._counted,
            works,
            models,
            is_healthy=lambda: not self._front.is_closing and self._failure is None,
        )
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=_quiet(),
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=self._args.grace_seconds,
            limit_concurrency=self._args.num_slots + self._args.max_queue + _SPARE_CONNECTIONS,
        )
        self._server = _Server(config)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self._say(f"serving {', '.join(m['id'] for m in models)} on http://{shown}:{port}/v1")
        await self._server.serve(sockets=[listener])

    def stop(self, number: signal.Signals) -> None:
        """Take no more requests; at the second signal, wait no longer for those that are open."""
        if self._server is not None and self._stopped_by is not None:
            self._server.force_exit = True
        self._stopped_by = number
        self._front.is_closing = True
        if self._server is not None:
            self._server.should_exit = True

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        if self._server is not None:
            self._server.should_exit = True


def _quiet() -> dict:
    """Return uvicorn's settings of its log without the messages about single connections."""
    settings = {**uvicorn_config.LOGGING_CONFIG}
    loggers = {name: {"level": "CRITICAL"} for name in settings["loggers"]}
    return settings | {"loggers": loggers}


def listener_of(host: str, port: int) -> socket.socket:
    """Return a bound socket; no client can connect before the server listens.

    Raises:
      InputError: there is no such address, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":  # accepted connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _UNREAD_SECONDS)
        listener.bind(address)
    except (OSError, ValueError) as error:
        raise errors.InputError(f"--host={host} --port={port}: {error}") from error
    return listener
