"""Open local and `gs://` files, and keep a dataset's image paths inside its root."""

import contextlib
import functools
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from prism_jax import errors
from prism_jax.data import records

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://|^(data|file|https?|ftp|gs|s3):", re.IGNORECASE)

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_remote(path: str) -> bool:
    """Return whether a path names an object store."""
    return path.startswith("gs://")


@contextlib.contextmanager
def explain(path: str) -> Iterator[None]:
    """Convert errors on a user's path to an `InputError` that names path and cause."""
    if _ADDRESS.match(path) and not is_remote(path):
        raise errors.InputError(f"{path}: must be a local path or begin with gs://")
    try:
        yield
    except ImportError as error:
        if "gcsfs" not in str(error):
            raise
        raise errors.InputError(
            f"{path}: reading gs:// needs the extra `gcs`: pip install 'prism-jax[gcs]'"
        ) from error
    except OSError as error:
        raise errors.InputError(f"{path}: {error.strerror or error}") from error


def open_binary(path: str) -> BinaryIO:
    """Open a user's file for reading bytes."""
    with explain(path):
        # Opening a pipe would block for ever.
        if not is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise errors.InputError(f"{path}: must be a regular file")
        return epath.Path(path).open("rb")


def is_folder(path: str) -> bool:
    """Return whether a path is a folder; InputError if it does not exist."""
    with explain(path):
        location = epath.Path(path)
        if not location.exists():
            raise errors.InputError(f"{path}: no such file or folder")
        return location.is_dir()


def join(folder: str, name: str) -> str:
    """Return the path of `name` below `folder`, local or remote."""
    return posixpath.join(folder, name) if is_remote(folder) else os.path.join(folder, name)


def parent(path: str) -> str:
    """Return the folder of a path."""
    return posixpath.dirname(path) if is_remote(path) else os.path.dirname(os.path.abspath(path))


def inside(root: str, path: str) -> str:
    """Return the full path of a dataset's image inside `root`, with links resolved.

    Raises:
      RowError: `unsafe_path` for NUL bytes, URLs, and paths that lead out of the root.
    """
    if "\0" in path:
        raise records.RowError("unsafe_path", f"image path holds a NUL character: {_shown(path)}")
    if is_remote(root):
        return _inside_remote(root.rstrip("/"), path)
    if _SCHEME.match(path):
        raise records.RowError(
            "unsafe_path", f"image path must be a file, not a URL: {_shown(path)}"
        )
    real_root = _real_folder(root if os.path.isabs(root) else os.path.join(os.getcwd(), root))
    full = _real_path(real_root, path)
    if full != real_root and not full.startswith(real_root.rstrip(os.sep) + os.sep):
        raise records.RowError("unsafe_path", f"image path leads out of {root}: {_shown(path)}")
    return full


def _shown(path: str) -> str:
    """Return a path for messages; a text too long for a path is probably the picture itself."""
    hint = "; a picture itself must be bytes, not text" if len(path) > 4096 else ""
    return records.shorten(repr(path), 100) + hint


@functools.lru_cache
def _real_folder(absolute: str) -> str:
    """Return a dataset's folder with links resolved, cached."""
    return os.path.realpath(absolute)


def _real_path(real_root: str, path: str) -> str:
    """Return a path below a resolved folder with all links resolved.

    The names of a plain path are checked from the folder on, not from the root of the file system:
    each check yields to other threads, and data sets have many small files.
    """
    names = path.split(os.sep)
    full = real_root
    for name in names:
        full = f"{full.rstrip(os.sep)}{os.sep}{name}"
        if name in ("", ".", "..") or os.path.islink(full):
            return os.path.realpath(os.path.join(real_root, path))
    return full


def _inside_remote(root: str, path: str) -> str:
    relative = path.removeprefix(f"{root}/")
    if _SCHEME.match(relative):
        raise records.RowError("unsafe_path", f"image path must lie below {root}: {_shown(path)}")
    normal = posixpath.normpath(relative)
    if normal.startswith("/") or normal == ".." or normal.startswith("../"):
        raise records.RowError("unsafe_path", f"image path leads out of {root}: {_shown(path)}")
    return f"{root}/{normal}"


def read_image(root: str, path: str, *, limit_bytes: int) -> bytes:
    """Return the bytes of a dataset's image file.

    Raises:
      RowError: `unsafe_path`, `image_missing`, or `image_too_big` (more than `limit_bytes`).
    """
    full = inside(root, path)
    with explain(full):
        try:
            num_bytes = _file_bytes(full)
            if num_bytes is None:
                raise records.RowError("image_missing", f"no file at {_shown(path)} below {root}")
            if num_bytes > limit_bytes:
                raise records.RowError(
                    "image_too_big",
                    f"{_shown(path)} has {num_bytes} bytes, the limit is {limit_bytes}",
                )
            if is_remote(full):
                return epath.Path(full).read_bytes()
            with open(full, "rb", buffering=0) as file:
                return file.readall()
        except OSError as error:
            raise records.RowError(
                "image_missing",
                f"cannot read {_shown(path)} below {root}: {error.strerror or error}",
            ) from error


def _file_bytes(full: str) -> int | None:
    """Return the size of a file; None if there is no regular file."""
    if is_remote(full):
        remote = epath.Path(full)
        return remote.stat().length if remote.exists() else None
    try:
        status = os.stat(full)
    except (OSError, ValueError):
        return None
    # Opening a pipe would block for ever.
    return status.st_size if stat.S_ISREG(status.st_mode) else None
