"""The manifest of a built folder: its content, its sources and its checksums.

It is written last, so a folder without it is not a data set. It contains neither times nor paths
of the machine: the same input gives the same bytes.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

from etils import epath

from prism_jax import errors
from prism_jax.data import arrayrecord, paths, records, validate

FILE = "build_manifest.json"
DROPPED = "dropped.jsonl"
_LIMIT_BYTES = 64 << 20
# Version 1 lacked learned turns and sizes of pictures, version 2 videos and names of splits.
_VERSION = 3
_SPLIT_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of the manifest."""

    kind: str
    splits: dict[str, int]  # name -> number of rows
    reports: dict[str, dict[str, Any]]  # of each split
    sources: list[str]
    files: dict[str, dict[str, Any]]  # name -> {"bytes", "sha256"}


def is_built(folder: str) -> bool:
    """Return whether a folder is a built data set."""
    with paths.explain(folder):
        return (epath.Path(folder) / FILE).exists()


def check_split(name: str) -> None:
    """Raise InputError for a name that no split can have: it is a part of names of files."""
    # TFDS reads `all` as the splits together.
    if not _SPLIT_NAME.fullmatch(name) or name == "all":
        raise errors.InputError(
            f"a split's name must be letters, digits and _, from a letter on, and not all, got "
            f"{name!r}"
        )


def write(
    folder: str, *, kind: str, reports: Mapping[str, validate.Report], sources: list[str]
) -> Manifest:
    """Add the list of dropped rows and the manifest to a folder of `tfds_builders.write`.

    Args:
      reports: of each split.
    """
    root = pathlib.Path(folder)
    lines = "".join(report.lines() for report in reports.values())
    (root / DROPPED).write_text(lines, encoding="utf-8")
    manifest = Manifest(
        kind=kind,
        splits={name: report.num_kept for name, report in reports.items()},
        reports={name: report.summary() for name, report in reports.items()},
        sources=sources,
        files={
            path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
            for path in sorted(root.iterdir())
        },
    )
    text = json.dumps({"version": _VERSION} | dataclasses.asdict(manifest), indent=2)
    (root / FILE).write_text(f"{text}\n", encoding="utf-8")
    return manifest


def read(folder: str) -> Manifest:
    """Read a built folder's manifest.

    Raises:
      InputError: the file is not a manifest, or has another version.
    """
    path = paths.join(folder, FILE)
    with paths.open_binary(path) as stream, paths.explain(path):
        text = stream.read(_LIMIT_BYTES + 1)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise errors.InputError(f"{path}: not a manifest of a data set: {error}") from error
    version = content.pop("version", None) if isinstance(content, dict) else None
    if version != _VERSION:
        raise errors.InputError(
            f"{path}: version must be {_VERSION}, got {records.shorten(repr(version), 40)}; build "
            "the folder again from its files"
        )
    problem = _problem(content)
    if problem is not None:
        raise errors.InputError(f"{path}: not a manifest of a data set: {problem}")
    return Manifest(**content)


def _problem(content: dict[str, Any]) -> str | None:
    """Return the first problem in a manifest's content."""
    types = {"kind": str, "splits": dict, "reports": dict, "sources": list, "files": dict}
    if content.keys() != types.keys():
        return f"must hold {', '.join(types)}, got {records.shorten(', '.join(content), 200)}"
    for name, kind in types.items():
        if not isinstance(content[name], kind):
            return f"{name} must be of type {kind.__name__}, got {type(content[name]).__name__}"
    for name, num_rows in content["splits"].items():
        if not _SPLIT_NAME.fullmatch(name) or type(num_rows) is not int:
            return f"splits: {records.shorten(repr(name), 100)} must be a name with a number"
    for name, facts in content["files"].items():
        shown = records.shorten(repr(name), 100)
        if pathlib.PurePath(name).name != name or "\0" in name or name in ("", "..", FILE):
            return f"files: {shown} must be the name of a file in the folder"
        if not isinstance(facts, dict) or facts.keys() != {"bytes", "sha256"}:
            return f"files: {shown} must have bytes and sha256"
        if type(facts["bytes"]) is not int or not isinstance(facts["sha256"], str):
            return f"files: {shown} must have bytes as a number and sha256 as text"
    return None


def verify(folder: str) -> Manifest:
    """Compare all files of a local built folder with the manifest's sha256."""
    manifest = read(folder)
    _check_files(folder, manifest)
    for name, facts in manifest.files.items():
        digest = _digest(pathlib.Path(folder) / name)
        if digest != facts["sha256"]:
            raise errors.InputError(
                f"{folder}/{name}: sha256 must be {facts['sha256']}, got {digest}"
            )
    return manifest


def open_folder(
    folder: str, *, kind: str, split: str | None, cache_dir: str | None
) -> arrayrecord.StoredRows:
    """Open the rows of a built folder's split; a folder on gs:// is first copied.

    Args:
      split: None: `train`, or the only one.
      cache_dir: where a folder on gs:// is copied to.
    """
    manifest = read(folder)
    names = list(manifest.splits)
    if split is None:
        split = names[0] if len(names) == 1 else arrayrecord.SPLIT
    if split not in names:
        raise errors.InputError(
            f"{folder}: has no split {split}; name one of {', '.join(names) or 'none'} as "
            "FOLDER#SPLIT"
        )
    if manifest.kind != kind:
        raise errors.InputError(f"{folder}: rows must be of kind {kind}, got {manifest.kind}")
    if paths.is_remote(folder):
        folder = _fetch(folder, manifest, cache_dir)
    _check_files(folder, manifest)
    rows = arrayrecord.StoredRows(folder, kind=kind, split=split, splits=names)
    if len(rows) != manifest.splits[split]:
        raise errors.InputError(
            f"{folder}: {split} must have {manifest.splits[split]} rows, got {len(rows)}"
        )
    return rows


def _check_files(folder: str, manifest: Manifest) -> None:
    """Raise InputError unless the folder has the files of the manifest and no others."""
    with paths.explain(folder):
        extra = sorted(set(os.listdir(folder)) - manifest.files.keys() - {FILE})
    if extra:
        names = records.shorten(", ".join(extra), 200)
        raise errors.InputError(f"{folder}: holds files that its {FILE} does not list: {names}")
    for name, facts in manifest.files.items():
        path = pathlib.Path(folder) / name
        num_bytes = path.stat().st_size if path.is_file() else None
        if num_bytes != facts["bytes"]:
            raise errors.InputError(f"{path}: must have {facts['bytes']} bytes, got {num_bytes}")


def _fetch(folder: str, manifest: Manifest, cache_dir: str | None) -> str:
    """Copy a remote folder, unless its copy exists, to a path with the hash of its content."""
    if cache_dir is None:
        raise errors.InputError(
            f"{folder}: ArrayRecord files are read from a local disk; set data.cache_dir"
        )
    content = json.dumps(manifest.files, sort_keys=True).encode("utf-8")
    local = pathlib.Path(cache_dir) / hashlib.sha256(content).hexdigest()[:16]
    if not local.exists():
        partial = local.with_name(f"{local.name}.incomplete.{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            for name in (*manifest.files, FILE):
                with paths.open_binary(paths.join(folder, name)) as remote:
                    with (partial / name).open("wb") as file:
                        shutil.copyfileobj(remote, file, 1 << 22)
            verify(os.fspath(partial))
            # Another process may have copied the same content meanwhile.
            if not local.exists():
                partial.rename(local)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return os.fspath(local)


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
