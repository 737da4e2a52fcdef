"""One job per run folder: a lock file with host, process and start time.

On the same host a lock whose process is gone is taken over at once. From another host the process
cannot be seen; there the owner's heartbeat, a counter in the file, is watched for a while instead,
which needs no agreement of clocks and also works on object stores.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator

from etils import epath

from prism_jax import errors

_NAME = "lock.json"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """Name the job that holds a folder."""

    host: str
    pid: int
    started: str  # when this process started, by the clock of its host
    beat: int  # raised every few seconds while the job lives


@contextlib.contextmanager
def hold(workdir: str, *, beat_seconds: float) -> Iterator[None]:
    """Hold the folder for this job while the context is open; call it on one process of a job.

    Args:
      workdir: local path or address of the run.
      beat_seconds: time between heartbeats. A lock of another host counts as dead when its beat
        stands still for three of them.

    Raises:
      InputError: another living job holds the folder.
    """
    path = epath.Path(workdir) / _NAME
    own = Owner(host=socket.gethostname(), pid=os.getpid(), started=_started(os.getpid()), beat=0)
    _take(path, own, beat_seconds)
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, own, beat_seconds, stop), daemon=True)
    beats.start()
    try:
        yield
    finally:
        stop.set()
        beats.join()
        holder = _read(path)
        if holder is not None and _is_same(holder, own):
            path.unlink(missing_ok=True)


def _take(path: epath.Path, own: Owner, beat_seconds: float) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.InputError(f"cannot make the folder {path.parent}: {error}") from error
    holder = _read(path)
    if holder is not None:
        if _lives(path, holder, own, beat_seconds):
            raise errors.InputError(
                f"{path.parent} is in use by process {holder.pid} on {holder.host}, started "
                f"{holder.started}; wait for it, or name another workdir"
            )
        _log.warning(
            "took over %s from process %d on %s, which is gone", path, holder.pid, holder.host
        )
        path.unlink(missing_ok=True)
    try:
        # Two jobs that start together: only one of them creates the file.
        with _create(path) as file:
            file.write(json.dumps(dataclasses.asdict(own)))
    except FileExistsError as error:
        raise errors.InputError(f"{path.parent} was just taken by another job") from error
    except OSError as error:
        raise errors.InputError(f"cannot write the lock file {path}: {error}") from error


def _create(path: epath.Path):
    # Object stores have no exclusive creation; there two jobs starting at once are not kept apart.
    return path.open("w") if "://" in str(path) else pathlib.Path(path).open("x")


def _lives(path: epath.Path, holder: Owner, own: Owner, beat_seconds: float) -> bool:
    if holder.host == own.host:
        return _started(holder.pid) == holder.started
    deadline = time.monotonic() + 3 * beat_seconds
    _log.warning("%s is held by %s; watching whether it lives", path, holder.host)
    while time.monotonic() < deadline:
        time.sleep(beat_seconds / 4)
        now = _read(path)
        if now is None:
            return False
        if now != holder:
            return True
    return False


def _beat(path: epath.Path, own: Owner, beat_seconds: float, stop: threading.Event) -> None:
    beat = 0
    while not stop.wait(beat_seconds):
        beat += 1
        holder = _read(path)
        if holder is None or not _is_same(holder, own):
            _log.error("%s is no longer this job's: another job took the folder over", path)
            return
        text = json.dumps(dataclasses.asdict(dataclasses.replace(own, beat=beat)))
        try:
            # Replaced as a whole: a reader never sees half a lock.
            partial = path.parent / f"{path.name}.partial"
            partial.write_text(text)
            partial.replace(path)
        except OSError as error:
            # The run goes on: a full disk stops it where it matters, at the next checkpoint.
            _log.warning("cannot refresh %s: %s", path, error)


def _read(path: epath.Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        # Left half-written by a job that was killed there.
        return Owner(host="", pid=-1, started="unknown", beat=-1)


def _is_same(one: Owner, other: Owner) -> bool:
    return dataclasses.replace(one, beat=0) == dataclasses.replace(other, beat=0)


def _started(pid: int) -> str | None:
    """Return when a process of this host started, None when there is no such process."""
    try:
        # Field 22 counts clock ticks since boot; the name in field 2 may hold spaces.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = next(
            int(line.split()[1])
            for line in pathlib.Path("/proc/stat").read_text().splitlines()
            if line.startswith("btime")
        )
    except (FileNotFoundError, ProcessLookupError):
        return _started_without_proc(pid)
    if fields[0] == "Z":
        return None
    seconds = boot + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()


def _started_without_proc(pid: int) -> str | None:
    """Tell only whether the process exists, where the system has no /proc."""
    if pathlib.Path("/proc/self").exists() or pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
