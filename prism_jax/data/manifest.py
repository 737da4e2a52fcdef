"""The manifest of a built folder: what is in it, where it came from, and whether it is whole.

It is written last, so a folder without it is not a data set. It holds no times and no paths of
the machine: the same input gives the same bytes.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

from etils import epath

from prism_jax import errors
from prism_jax.data import arrayrecord, paths, validate

FILE = "build_manifest.json"
DROPPED = "dropped.jsonl"
_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the manifest says."""

    kind: str
    num_rows: int
    report: dict[str, Any]
    sources: list[str]
    files: dict[str, dict[str, Any]]  # name -> {"bytes", "sha256"}


def is_built(folder: str) -> bool:
    """Tell whether a folder is a built data set."""
    with paths.explain(folder):
        return (epath.Path(folder) / FILE).exists()


def write(folder: str, *, kind: str, report: validate.Report, sources: list[str]) -> Manifest:
    """Add the list of dropped rows and the manifest to a folder of `arrayrecord.write`."""
    root = pathlib.Path(folder)
    (root / DROPPED).write_text(report.lines(), encoding="utf-8")
    found = Manifest(
        kind=kind,
        num_rows=report.num_kept,
        report=report.summary(),
        sources=sources,
        files={
            path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
            for path in sorted(root.iterdir())
        },
    )
    text = json.dumps({"version": _VERSION} | dataclasses.asdict(found), indent=2)
    (root / FILE).write_text(f"{text}\n", encoding="utf-8")
    return found


def read(folder: str) -> Manifest:
    """Read a built folder's manifest."""
    path = paths.join(folder, FILE)
    with paths.open_binary(path) as stream:
        try:
            found = json.loads(stream.read())
            version = found.pop("version")
            if version != _VERSION:
                raise errors.InputError(f"{path}: version must be {_VERSION}, got {version}")
            return Manifest(**found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, errors.InputError):
                raise
            raise errors.InputError(f"{path}: not a manifest of a data set: {error}") from error


def verify(folder: str) -> Manifest:
    """Compare every file of a local built folder with the manifest's sha256."""
    found = read(folder)
    _check_sizes(folder, found)
    for name, facts in found.files.items():
        digest = _digest(pathlib.Path(folder) / name)
        if digest != facts["sha256"]:
            raise errors.InputError(
                f"{folder}/{name}: sha256 must be {facts['sha256']}, got {digest}"
            )
    return found


def open_folder(folder: str, *, kind: str, cache_dir: str | None) -> arrayrecord.StoredRows:
    """Open a built folder's rows; one on gs:// is first copied below `cache_dir`."""
    found = read(folder)
    if found.kind != kind:
        raise errors.InputError(f"{folder}: rows must be of kind {kind}, got {found.kind}")
    if paths.is_remote(folder):
        folder = _fetch(folder, found, cache_dir)
    _check_sizes(folder, found)
    rows = arrayrecord.StoredRows(folder, kind=kind)
    if len(rows) != found.num_rows:
        raise errors.InputError(f"{folder}: must have {found.num_rows} rows, got {len(rows)}")
    return rows


def _check_sizes(folder: str, found: Manifest) -> None:
    for name, facts in found.files.items():
        path = pathlib.Path(folder) / name
        if pathlib.PurePath(name).name != name:
            raise errors.InputError(f"{folder}/{FILE}: file names have no folders, got {name!r}")
        num_bytes = path.stat().st_size if path.is_file() else None
        if num_bytes != facts["bytes"]:
            raise errors.InputError(f"{path}: must have {facts['bytes']} bytes, got {num_bytes}")


def _fetch(folder: str, found: Manifest, cache_dir: str | None) -> str:
    """Copy a remote folder, unless it is there; its place is named by the manifest's content."""
    if cache_dir is None:
        raise errors.InputError(
            f"{folder}: ArrayRecord files are read from a local disk; set data.cache_dir"
        )
    content = json.dumps(found.files, sort_keys=True).encode("utf-8")
    local = pathlib.Path(cache_dir) / hashlib.sha256(content).hexdigest()[:16]
    if not local.exists():
        partial = local.with_name(f"{local.name}.incomplete.{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            for name in (*found.files, FILE):
                with paths.open_binary(paths.join(folder, name)) as remote:
                    with (partial / name).open("wb") as file:
                        shutil.copyfileobj(remote, file, 1 << 22)
            verify(os.fspath(partial))
            # Another process of this machine may have been faster with the same content.
            if not local.exists():
                partial.rename(local)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return os.fspath(local)


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
