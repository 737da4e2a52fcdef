"""The small files of a run on gs://: written to a local folder, and uploaded whole.

Objects cannot be appended to, and much here appends: metrics, accounts, event files. So a run whose
folder is an address works in a local folder. Process 0 begins with the files at the address;
`upload` writes those that changed since, and removes those that are gone. Each process uploads the
files that it wrote. Checkpoints and the lock do not go through here.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from prism_jax.checkpoints import files as checkpoint_files
from prism_jax.checkpoints import lock, objects

# These lie at the address alone.
_REMOTE = (checkpoint_files.FOLDER, "set_aside", "finished.json", lock.NAME)
_PARTIAL = ".partial"
_Stamp = tuple[int, int]  # time of the last change, size


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mirror:
    remote: epath.Path
    local: pathlib.Path
    known: dict[str, _Stamp]  # of the files at the address, as this process wrote or read them


_held: dict[pathlib.Path, _Mirror] = {}


@contextlib.contextmanager
def opened(workdir: str, *, has_files: bool) -> Iterator[pathlib.Path]:
    """Yield the local folder of a run; its changes are uploaded at the end.

    Args:
      has_files: begin with the files at the address; for process 0.
    """
    if checkpoint_files.is_local(epath.Path(workdir)):
        yield pathlib.Path(workdir)
        return
    objects.file_system()
    local = pathlib.Path(tempfile.mkdtemp(prefix=f"prism_jax-{os.getuid()}-"))
    mirror = _Mirror(remote=epath.Path(workdir), local=local, known={})
    if has_files:
        _fetch(mirror, "")
    _held[local] = mirror
    try:
        yield local
        upload()
    except BaseException:
        # The error that ended the job must not be hidden by this one.
        with contextlib.suppress(Exception):
            upload()
        raise
    finally:
        del _held[local]
        shutil.rmtree(local, ignore_errors=True)


def address(folder: pathlib.Path) -> str:
    """Return where a folder of a run is for good: its address, or its absolute path."""
    for local, mirror in _held.items():
        if folder == local or local in folder.parents:
            return str(mirror.remote / folder.relative_to(local))
    return str(folder.absolute())


def fetch(folder: pathlib.Path) -> None:
    """Get a folder of a run that another process has uploaded; nothing where both share it."""
    for local, mirror in _held.items():
        if local in folder.parents:
            _fetch(mirror, str(folder.relative_to(local)))


def upload() -> None:
    """Upload the files that this process has changed since the last call.

    Raises:
      InputError: another job took a folder over, see `checkpoints.lock.check`.
    """
    for mirror in _held.values():
        lock.check()
        there = _stamps(mirror.local)
        for name, stamp in there.items():
            if mirror.known.get(name) != stamp:
                (mirror.remote / name).write_bytes((mirror.local / name).read_bytes())
                mirror.known[name] = stamp
        for name in sorted(mirror.known.keys() - there.keys()):
            (mirror.remote / name).unlink(missing_ok=True)
            del mirror.known[name]


def _fetch(mirror: _Mirror, folder: str) -> None:
    """Copy files from the address, all of them or those of one folder."""
    files = objects.file_system()
    # Other processes, and other machines before, wrote there.
    files.invalidate_cache()
    start = str(mirror.remote).removeprefix("gs://").rstrip("/") + "/"
    for key in files.find(start + folder):
        name = key.removeprefix(start)
        if name.split("/")[0] in _REMOTE or name.endswith(_PARTIAL):
            continue
        target = mirror.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files.cat_file(key))
        mirror.known[name] = _stamp(target)


def _stamps(folder: pathlib.Path) -> dict[str, _Stamp]:
    return {
        str(path.relative_to(folder)): _stamp(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(_PARTIAL)
    }


def _stamp(path: pathlib.Path) -> _Stamp:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
