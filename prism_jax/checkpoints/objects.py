"""Single objects of Google Cloud Storage, written only if nobody else wrote in between.

Each version of an object has a generation; a write names the one that it replaces, 0 for none.
"""

import json
from typing import Any

import fsspec
from etils import epath

from prism_jax import errors

_PRECONDITION = 412


def file_system() -> Any:
    """Return the file system of gs:// addresses.

    Raises:
      InputError: the package for it is missing.
    """
    try:
        return fsspec.filesystem("gcs")
    except ImportError as error:
        raise errors.InputError(
            "gs:// addresses need the package gcsfs: pip install 'prism-jax[gcs]'"
        ) from error


def read(path: epath.Path) -> tuple[bytes, int]:
    """Return an object and its generation; nothing and 0 where there is none."""
    files = file_system()
    bucket, key, _ = files.split_path(str(path))
    while True:
        try:
            # Not `info`, which may answer from an older listing.
            facts = files.call("GET", "b/{}/o/{}", bucket, key, json_out=True)
        except FileNotFoundError:
            return b"", 0
        number = int(facts["generation"])
        try:
            _, content = files.call("GET", "b/{}/o/{}", bucket, key, alt="media", generation=number)
        except FileNotFoundError:
            continue  # replaced in between
        return content, number


def write(path: epath.Path, content: bytes, *, replaced: int) -> None:
    """Write an object in place of this generation of it.

    Raises:
      FileExistsError: it has another generation by now.
    """
    files = file_system()
    bucket, key, _ = files.split_path(str(path))
    head = json.dumps({"name": key}).encode()
    body = (
        b"--==0==\nContent-Type: application/json; charset=UTF-8\n\n" + head
        + b"\n--==0==\nContent-Type: application/octet-stream\n\n" + content + b"\n--==0==--"
    )  # fmt: skip
    try:
        files.call(
            "POST",
            f"{files._location}/upload/storage/v1/b/{bucket}/o",
            uploadType="multipart",
            ifGenerationMatch=str(replaced),
            headers={"Content-Type": 'multipart/related; boundary="==0=="'},
            data=body,
            json_out=True,
        )
    except OSError as error:
        if not _is_written_meanwhile(error):
            raise
        # An attempt whose answer was lost may have written it already.
        if read(path)[0] != content:
            raise FileExistsError(f"{path} was written meanwhile") from error


def delete(path: epath.Path, *, generation: int) -> None:
    """Delete an object if it still has this generation."""
    files = file_system()
    bucket, key, _ = files.split_path(str(path))
    try:
        files.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=str(generation))
    except FileNotFoundError:
        pass
    except OSError as error:
        if not _is_written_meanwhile(error):
            raise


def _is_written_meanwhile(error: OSError) -> bool:
    return isinstance(error, FileExistsError) or getattr(error, "code", None) == _PRECONDITION
