"""One job per run folder: a lock file with host, process and start time.

On the same host a lock whose process is gone is taken over at once. From another host the process
cannot be seen; there the owner's heartbeat, a counter in the file, is watched for a while instead,
which needs no agreement of clocks and also works on object stores.

The file is looked at and changed under an flock, so of several jobs that find the same dead lock
one gets it. Object stores, and file systems without flock, cannot promise that; and a job that was
suspended for long loses its lock to one that took it for dead. So a job asks `check` before each
save whether the folder is still its own, and stops when it is not.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import json
import logging
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import TextIO

from etils import epath

from prism_jax import errors

_NAME = "lock.json"
_TURN = "lock.json.turn"  # there while a process looks at the lock and changes it
_NO_FLOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """Name the job that holds a folder."""

    host: str
    pid: int
    started: str  # when this process started, by the clock of its host
    beat: int  # raised every few seconds while the job lives


_held: dict[epath.Path, Owner] = {}  # lock files of this process


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
    _held[path] = own
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, own, beat_seconds, stop), daemon=True)
    beats.start()
    try:
        yield
    finally:
        stop.set()
        beats.join()
        del _held[path]
        _release(path, own)


def check() -> None:
    """Raise when a folder that this process holds is no longer its own; ask before each save.

    A process that holds nothing, such as the others of a job, passes.

    Raises:
      InputError: another job took the folder over, or the lock file was removed.
    """
    for path, own in list(_held.items()):
        holder = _read(path)
        if holder is None:
            raise errors.InputError(
                f"{path} is gone, so another job may use the folder: this job stops and writes "
                "nothing more there"
            )
        if not _is_same(holder, own):
            raise errors.InputError(
                f"{path.parent} was taken over by process {holder.pid} on {holder.host}, which "
                "saw no sign of life of this job: it stops and writes nothing more there"
            )


def _take(path: epath.Path, own: Owner, beat_seconds: float) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.InputError(f"cannot make the folder {path.parent}: {error}") from error
    gone = None
    try:
        # Whether the holder lives may take long to see, so others have their turn meanwhile; it
        # counts when the same lock is still there in the next turn.
        while (holder := _put(path, own, gone)) is not None:
            if _lives(path, holder, own, beat_seconds):
                raise errors.InputError(
                    f"{path.parent} is in use by process {holder.pid} on {holder.host}, started "
                    f"{holder.started}; wait for it, or name another workdir"
                )
            gone = holder
        holder = _read(path)
    except FileExistsError as error:
        raise errors.InputError(f"{path.parent} was just taken by another job") from error
    except OSError as error:
        raise errors.InputError(f"cannot write the lock file {path}: {error}") from error
    if holder is None or not _is_same(holder, own):
        raise errors.InputError(f"{path.parent} was just taken by another job")


def _put(path: epath.Path, own: Owner, gone: Owner | None) -> Owner | None:
    """Write the own lock where there is none or still that of `gone`; else return the holder."""
    with _turn(path):
        holder = _read(path)
        if holder is None:
            with _create(path) as file:
                file.write(json.dumps(dataclasses.asdict(own)))
            return None
        if holder != gone:
            return holder
        _log.warning(
            "took over %s from process %d on %s, which is gone", path, holder.pid, holder.host
        )
        _replace(path, own)
        return None


def _release(path: epath.Path, own: Owner) -> None:
    try:
        with _turn(path):
            holder = _read(path)
            if holder is not None and _is_same(holder, own):
                path.unlink(missing_ok=True)
    except OSError as error:
        # What ended the job, if anything did, must not be hidden by this.
        _log.warning("cannot remove %s: %s", path, error)


@contextlib.contextmanager
def _turn(path: epath.Path) -> Iterator[None]:
    """Keep all other processes from changing the lock while the context is open."""
    if "://" in str(path):
        yield
        return
    turn = pathlib.Path(path).with_name(_TURN)
    file = _wait_for_turn(turn)
    try:
        yield
    finally:
        turn.unlink(missing_ok=True)
        _end_turn(file)


def _wait_for_turn(turn: pathlib.Path) -> TextIO:
    while True:
        file = turn.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Who had the turn before removed its file at the end: the one there now counts.
            if os.path.samestat(os.fstat(file.fileno()), turn.stat()):
                return file
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _NO_FLOCK:
                _tell_no_flock(turn.parent)
                return file
            file.close()
            raise
        _end_turn(file)


def _end_turn(file: TextIO) -> None:
    with file, contextlib.suppress(OSError):
        # Closing alone is not enough when a process that was forked meanwhile has the file too.
        fcntl.flock(file, fcntl.LOCK_UN)


@functools.cache
def _tell_no_flock(folder: pathlib.Path) -> None:
    _log.warning("%s has no flock: jobs that start at once are told apart only later", folder)


def _create(path: epath.Path):
    # Object stores have no exclusive creation; there two jobs starting at once are not kept apart.
    return path.open("w") if "://" in str(path) else pathlib.Path(path).open("x")


def _replace(path: epath.Path, own: Owner) -> None:
    """Write the lock as a whole: a reader never sees half of it."""
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(json.dumps(dataclasses.asdict(own)))
    partial.replace(path)


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
        try:
            with _turn(path):
                holder = _read(path)
                if holder is None or not _is_same(holder, own):
                    _log.error("%s is no longer this job's, which stops at its next save", path)
                    return
                _replace(path, dataclasses.replace(own, beat=beat))
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
