"""One job per run folder: a lock file that names machine, process and folder.

A lock of the same machine (same boot id and process namespace) whose process is gone is taken over
at once. From another machine the process is not visible, so the owner's heartbeat, a counter in the
file, is watched for a while instead. The same goes for a lock that names another folder than the
one it lies in: it was copied with the folder, and nobody refreshes the copy. None of this needs a
clock, which may be set while a job runs.

The file is read and changed under an flock, so that of several jobs that see the same dead lock
exactly one gets it. On gs:// a write names the version that it replaces, to the same effect. File
systems without flock cannot promise that; and a job that was suspended for long loses its lock to
one that took it for dead. A job therefore calls `check` before each save, and stops when the folder
is held by another job.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import hashlib
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

from prism_jax import errors, small_files
from prism_jax.checkpoints import objects

NAME = "lock.json"
_TURN = "lock.json.turn"  # exists while a process reads and changes the lock
_NO_FLOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """The job that holds a folder, and the folder."""

    host: str
    machine: str  # its boot, and the namespace of the process number
    pid: int
    ticks: str  # clock ticks of the machine from its boot to the start of the process
    folder: str  # device and inode; empty where there are none
    since: str  # when the folder was taken, by the host's clock: only for messages
    beat: int  # raised every few seconds while the job lives


_SCHEMA = {
    field.name: int if field.name in ("pid", "beat") else str for field in dataclasses.fields(Owner)
}


_held: dict[epath.Path, Owner] = {}  # lock files of this process


@contextlib.contextmanager
def hold(workdir: str, *, beat_seconds: float) -> Iterator[None]:
    """Hold the folder for this job while the context is open; call it in one process of a job.

    Args:
      workdir: local path or address of the run.
      beat_seconds: time between heartbeats. A lock of another host counts as dead when its counter
        does not change for three of them.

    Raises:
      InputError: another living job holds the folder.
    """
    path = epath.Path(workdir) / NAME
    _make_folder(path.parent)
    this_job = Owner(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        ticks=_ticks(os.getpid()) or "",
        folder=_folder(path.parent),
        since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        beat=0,
    )
    _take(path, this_job, beat_seconds)
    _held[path] = this_job
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, this_job, beat_seconds, stop), daemon=True)
    beats.start()
    try:
        yield
    finally:
        stop.set()
        beats.join()
        del _held[path]
        _release(path, this_job)


def check() -> None:
    """Raise when another job has taken a folder of this process; call it before each save.

    A process that holds no folder, such as the others of a job, passes.

    Raises:
      InputError: another job took the folder over, or the lock file was removed.
    """
    for path, this_job in list(_held.items()):
        holder = _read(path)
        if holder is None:
            raise errors.InputError(
                f"{path} is gone, so another job may use the folder: this job stops and writes "
                "nothing more there"
            )
        if not _is_same(holder, this_job):
            raise errors.InputError(
                f"{path.parent} was taken over by process {holder.pid} on {holder.host}, which "
                "saw no sign of life of this job: it stops and writes nothing more there"
            )


def release_all() -> None:
    """Let go of the folders that this process holds, when it ends without leaving its contexts."""
    for path, this_job in list(_held.items()):
        _release(path, this_job)


def _make_folder(folder: epath.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.InputError(f"cannot make the folder {folder}: {error}") from error


def _take(path: epath.Path, this_job: Owner, beat_seconds: float) -> None:
    gone = None
    try:
        # Watching the holder may take long, so other jobs get their turn meanwhile; the result
        # counts if the same lock is still there in the next turn.
        while (holder := _put(path, this_job, gone)) is not None:
            if _lives(path, holder, this_job, beat_seconds):
                raise errors.InputError(
                    f"{path.parent} is in use by process {holder.pid} on {holder.host}, since "
                    f"{holder.since}; wait for it, or name another workdir"
                )
            gone = holder
        holder = _read(path)
    except FileExistsError as error:
        raise errors.InputError(f"{path.parent} was just taken by another job") from error
    except OSError as error:
        raise errors.InputError(f"cannot write the lock file {path}: {error}") from error
    if holder is None or not _is_same(holder, this_job):
        raise errors.InputError(f"{path.parent} was just taken by another job")


def _put(path: epath.Path, this_job: Owner, gone: Owner | None) -> Owner | None:
    """Write this job's lock if there is none, or still that of `gone`; else return the holder."""
    with _turn(path):
        holder, version = _read_version(path)
        if holder is None:
            _create(path, this_job)
            return None
        if holder != gone:
            return holder
        _log.warning(
            "took over %s from process %d on %s, which is gone", path, holder.pid, holder.host
        )
        _replace(path, this_job, version)
        return None


def _release(path: epath.Path, this_job: Owner) -> None:
    try:
        with _turn(path):
            holder, version = _read_version(path)
            if holder is not None and _is_same(holder, this_job):
                if _is_object(path):
                    objects.delete(path, generation=version)
                else:
                    path.unlink(missing_ok=True)
    except OSError as error:
        # An error that ended the job must not be hidden by this one.
        _log.warning("cannot remove %s: %s", path, error)


@contextlib.contextmanager
def _turn(path: epath.Path) -> Iterator[None]:
    """Prevent other processes from changing the lock while the context is open."""
    if _is_object(path):
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
            # The previous process removed its turn file at its end: only the current file counts.
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
        # Closing alone is not enough when a process forked meanwhile holds the file too.
        fcntl.flock(file, fcntl.LOCK_UN)


@functools.cache
def _tell_no_flock(folder: pathlib.Path) -> None:
    _log.warning("%s has no flock: jobs that start at once are told apart only later", folder)


def _create(path: epath.Path, this_job: Owner) -> None:
    """Write the lock where there is none; FileExistsError where there is one by then."""
    if _is_object(path):
        objects.write(path, _content(this_job), replaced=0)
        return
    with pathlib.Path(path).open("xb") as file:
        file.write(_content(this_job))


def _replace(path: epath.Path, this_job: Owner, version: int) -> None:
    """Write the lock as a whole: a reader never sees half of it.

    Without waiting for the disk: after a power cut there is no process that it could name.

    Raises:
      FileExistsError: on gs://, when it is no longer of this version.
    """
    if _is_object(path):
        objects.write(path, _content(this_job), replaced=version)
        return
    partial = path.parent / f"{path.name}.partial"
    partial.write_bytes(_content(this_job))
    partial.replace(path)


def _lives(path: epath.Path, holder: Owner, this_job: Owner, beat_seconds: float) -> bool:
    if holder.machine == this_job.machine:
        is_there = _ticks(holder.pid) == holder.ticks
        if not is_there or holder.folder == this_job.folder:
            return is_there
    deadline = time.monotonic() + 3 * beat_seconds
    _log.warning(
        "%s is held by process %d on %s; watching whether it lives", path, holder.pid, holder.host
    )
    while time.monotonic() < deadline:
        time.sleep(beat_seconds / 4)
        current = _read(path)
        if current is None:
            return False
        if current != holder:
            return True
    return False


def _beat(path: epath.Path, this_job: Owner, beat_seconds: float, stop: threading.Event) -> None:
    beat = 0
    while not stop.wait(beat_seconds):
        beat += 1
        try:
            with _turn(path):
                holder, version = _read_version(path)
                if holder is None or not _is_same(holder, this_job):
                    _log.error("%s is no longer this job's, which stops at its next save", path)
                    return
                _replace(path, dataclasses.replace(this_job, beat=beat), version)
        except OSError as error:
            # The run goes on: a full disk stops it at the next checkpoint, where it matters.
            _log.warning("cannot refresh %s: %s", path, error)


def _is_object(path: epath.Path) -> bool:
    return "://" in str(path)


def _content(owner: Owner) -> bytes:
    return json.dumps(dataclasses.asdict(owner)).encode()


def _read(path: epath.Path) -> Owner | None:
    return _read_version(path)[0]


def _read_version(path: epath.Path) -> tuple[Owner | None, int]:
    """Return the holder, and on gs:// the version of the lock, else 0."""
    if _is_object(path):
        data, version = objects.read(path)
        return (_parse(data, path), version) if version else (None, 0)
    try:
        return _parse(path.read_bytes(), path), 0
    except FileNotFoundError:
        return None, 0


def _parse(data: bytes, path: epath.Path) -> Owner:
    try:
        owner = small_files.parse(data, _SCHEMA, where=str(path))
        return Owner(**{name: owner[name] for name in _SCHEMA})
    except errors.InputError:
        # Half-written by a killed job, or of another version, which changes it while it lives.
        digest = hashlib.sha256(data).hexdigest()
        return Owner(
            host="unknown", machine="", pid=-1, ticks=digest, folder="", since="unknown", beat=-1
        )


def _is_same(first: Owner, second: Owner) -> bool:
    return dataclasses.replace(first, beat=0) == dataclasses.replace(second, beat=0)


def _machine() -> str:
    """Return an id shared by all processes that can see each other by number."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"host {socket.gethostname()}"


def _folder(folder: epath.Path) -> str:
    """Return an id that differs between a folder and its copies, on this machine."""
    if "://" in str(folder):
        return ""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise errors.InputError(f"cannot read the folder {folder}: {error}") from error
    return f"{status.st_dev}:{status.st_ino}"


def _ticks(pid: int) -> str | None:
    """Return the start of a process of this machine in ticks, None without such a process."""
    if pid <= 0:
        return None
    try:
        # Field 22 counts clock ticks since boot; the name in field 2 may hold spaces.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return _ticks_without_proc(pid)
    return None if fields[0] in ("Z", "X") else fields[19]


def _ticks_without_proc(pid: int) -> str | None:
    """Return a constant for an existing process, on systems without /proc."""
    if pathlib.Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
