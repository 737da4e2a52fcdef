"""Agreement among the processes of a job: decisions of the first, gathered values, the end.

    on_first      process 0 decides, all get its result or its error
    gather        each gives a value, all get all of them
    Inputs        the data of a step, compared among all while the devices work on it
    watch         a process that fails tells the others, which end with its exit code

In a job of one process nothing is sent.
"""

import atexit
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prism_jax import errors

Json = Any

LOST_PEER = 134  # as where JAX itself ends a process that lost another
_FOREVER_MS = 7 * 24 * 3600 * 1000
_END = "prism_jax/end"
_FIRST = f"{_END}/first"
_SEEN = "prism_jax/seen"
_LOOK_SECONDS = 2.0
_SEEN_SECONDS = 10.0
_GRACE_SECONDS = 3.0
_LINE_CHARS = 2000
# From errors of collectives and of the coordination service when a process has gone.
_LOST = (
    "Gloo",
    "Connection reset by peer",
    "Socket closed",
    "coordination service",
    "CoordinationService",
    "NCCL operation",
    "ncclRemoteError",
    "heartbeat",
)
_counts: dict[str, int] = {}


class LostPeerError(errors.RunError):
    """Another process of the job has gone."""

    exit_code = LOST_PEER


def on_first(name: str, decide: Callable[[], Json]) -> Json:
    """Decide on process 0; return the result, or raise the error, on every process.

    Every process calls this at the same place; process 0 may take its time.

    Args:
      name: of the decision, for whoever looks at a job that hangs.
      decide: called on process 0 alone; returns JSON.

    Raises:
      KnownError: the one that `decide` raised on process 0, with its line and exit code.
    """
    if jax.process_count() == 1:
        return decide()
    _counts[name] = _counts.get(name, 0) + 1
    key = f"prism_jax/first/{name}/{_counts[name]}"
    client = _client()
    if jax.process_index() != 0:
        verdict = json.loads(client.blocking_key_value_get(key, _FOREVER_MS))
        if "error" in verdict:
            raise _error(verdict["error"], verdict["code"])
        return verdict["value"]
    try:
        value = decide()
    except errors.KnownError as error:
        client.key_value_set(key, json.dumps({"error": str(error), "code": error.exit_code}))
        raise
    client.key_value_set(key, json.dumps({"value": value}))
    return value


def _client() -> Any:
    # Loaded here: it rests on private modules of JAX, which a job of one process does not need.
    return importlib.import_module("prism_jax.setup.coordination").client()


def _error(line: str, code: int) -> errors.KnownError:
    error = (
        errors.InputError(line) if code == errors.InputError.exit_code else errors.RunError(line)
    )
    error.exit_code = code
    return error


def gather(value: Json) -> list[Json]:
    """Return the values of all processes in their order; every process calls this."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32)).reshape(-1)
    # Few sizes, so that few programs are compiled.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded[None], tiled=True)
    return [
        json.loads(row[:size].tobytes().decode()) for row, size in zip(rows, sizes, strict=True)
    ]


def own_part(values: list[Any]) -> list[Any]:
    """Return this process's share of the values, which are dealt out one by one."""
    return values[jax.process_index() :: jax.process_count()]


def gather_parts(part: list[Json], size: int) -> list[Json]:
    """Return all values in order, of which each process gives those of `own_part`."""
    values: list[Json] = [None] * size
    for process, values_of in enumerate(gather(part)):
        values[process :: jax.process_count()] = values_of
    return values


def require_same(name: str, value: Json) -> None:
    """Refuse a job whose processes do not have the same value, such as other files.

    Raises:
      InputError: on all of them.
    """
    given = gather(value)
    others = [number for number, one in enumerate(given) if one != given[0]]
    if others:
        raise errors.InputError(
            f"the processes of this job do not have the same {name}: process 0 has {given[0]}, "
            f"process {others[0]} has {given[others[0]]}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """The comparison of a step, perhaps still under way."""

    step: int
    least: Any  # [2]  digest and wish
    most: Any


class Inputs:
    """The comparison of each step's data among the processes, while the devices work.

    Each stage notes everything that all processes must have decided alike: rows, responses,
    rewards. The wish of process 0 to save goes with it, so that all save in the same step.
    """

    def __init__(self) -> None:
        self._digests: dict[int, int] = {}
        self._lock = threading.Lock()

    def note(self, step: int, *parts: Any) -> None:
        """Add arrays, or texts of JSON values, to the data of a step; from any thread.

        Args:
          step: counted from 0.
        """
        with self._lock:
            digest = self._digests.get(step, 0)
            for part in parts:
                is_array = isinstance(part, np.ndarray)
                data = np.ascontiguousarray(part).tobytes() if is_array else repr(part).encode()
                digest = zlib.crc32(data, digest)
            self._digests[step] = digest

    def send(self, step: int, *, wishes_save: bool) -> Sent:
        """Start to compare a step, counted from 0; each process calls this once a step."""
        with self._lock:
            digest = self._digests.pop(step, 0)
        row = np.array([digest, wishes_save and jax.process_index() == 0], np.uint32)
        if jax.process_count() == 1:
            return Sent(step=step, least=row, most=row)
        place = _one_row_a_process()
        rows = jax.make_array_from_process_local_data(
            place, row[None], (jax.process_count(), len(row))
        )
        least, most = _least_and_most(NamedSharding(place.mesh, PartitionSpec()))(rows)
        for array in (least, most):
            array.copy_to_host_async()
        return Sent(step=step, least=least, most=most)

    def read(self, sent: Sent) -> bool:
        """Wait for the comparison and return whether process 0 wishes to save.

        Raises:
          RunError: the data of the step differ among the processes.
        """
        least, most = jax.device_get((sent.least, sent.most))
        if least[0] != most[0]:
            raise errors.RunError(
                f"step {sent.step + 1}: the processes of this job made different rows, responses "
                f"or rewards of it (digests from {least[0]:08x} to {most[0]:08x}); it stops, and "
                "goes on from its last checkpoint when it is started again"
            )
        return bool(most[1])


@functools.cache
def _one_row_a_process() -> NamedSharding:
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    return NamedSharding(Mesh(devices, ("process", "local")), PartitionSpec("process"))


@functools.cache
def _least_and_most(replicated: NamedSharding) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    return jax.jit(lambda x: (x.min(0), x.max(0)), out_shardings=replicated)


class Ends:
    """The common end of a job: when a process fails, all end alike, and none waits for ever.

    A process that waits in a collective for one that failed cannot be reached there. So a thread
    waits for the first failure, and ends the process when it does not end by itself.
    """

    def __init__(self, release: Callable[[], None]):
        """Start the thread, once `jax.distributed` is there.

        Args:
          release: releases things that would outlive the process, such as locks.
        """
        self._release = release
        self._client = _client()
        self._is_leaving = threading.Event()
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()
        # Python must not end while the thread is inside of the service's client.
        atexit.register(self._stop)

    def fail(self, error: BaseException, line: str | None, code: int) -> None:
        """Tell the others, and end the process; never returns.

        Args:
          line: the message of the other processes; None: a bug, printed here with its traceback.
        """
        self._is_leaving.set()
        if line is None and is_lost_peer(error):
            line, code = f"another process of the job was lost: {error}", LOST_PEER
        if line is None:
            traceback.print_exception(error)
        else:
            sys.stderr.write(f"error: {' '.join(line.split())[:_LINE_CHARS]}\n")
        failure = {"process": jax.process_index(), "line": line, "code": code}
        # Another process may have been the first, or the service has gone.
        with contextlib.suppress(Exception):
            self._client.key_value_set(_FIRST, json.dumps(failure))
        self._note_seen()
        self._leave(code)

    def _stop(self) -> None:
        self._is_leaving.set()
        self._thread.join()

    def _wait(self) -> None:
        # With the service gone JAX ends the process by itself.
        with contextlib.suppress(Exception):
            while not self._client.key_value_dir_get(_END):
                if self._is_leaving.wait(_LOOK_SECONDS):
                    return
        with contextlib.suppress(Exception):
            failure = json.loads(self._client.blocking_key_value_get(_FIRST, 1000))
            self._note_seen()
            self._follow(failure)

    def _note_seen(self) -> None:
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_SEEN}/{jax.process_index()}", "")

    def _follow(self, failure: Json) -> None:
        """End as the process that failed first."""
        # Usually all fail alike, and each prints the error itself.
        if self._is_leaving.wait(_GRACE_SECONDS):
            return
        line, code = failure["line"], failure["code"]
        if line is None:
            line, code = "an unexpected error, see its standard error", LOST_PEER
        sys.stderr.write(f"error: process {failure['process']}: {line}\n")
        self._release()
        self._leave(code)

    def _leave(self, code: int) -> None:
        """End without JAX's barrier at the exit, which waits minutes for those that have gone."""
        deadline = time.monotonic() + _SEEN_SECONDS
        is_last = jax.process_index() == 0  # the service ends with it
        while is_last and time.monotonic() < deadline:
            try:
                seen = self._client.key_value_dir_get(_SEEN)
            except Exception:
                break
            if len(seen) == jax.process_count():
                time.sleep(_GRACE_SECONDS + 1)
                break
            time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error that is not known otherwise comes from the loss of a process."""
    return any(mark in str(error) for mark in _LOST)


def watch(release: Callable[[], None]) -> None:
    """Let this process and the others end alike; call it once, when they have joined."""
    errors.end_of_job.append(Ends(release).fail)
