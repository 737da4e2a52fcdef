"""The files of a benchmark in a folder as the hub publishes it."""

import pathlib
import re

from etils import epath

from prism_jax import errors
from prism_jax.data import json_tables, manifest, parquet_tables, paths
from prism_jax.data.benchmarks import layout

_ENDINGS = (".parquet", ".jsonl", ".json")
_SHARD = r"(-\d{5}-of-\d{5}(-[0-9a-f]+)?)?"


def find(folder: pathlib.Path, wanted: layout.Layout) -> list[pathlib.Path]:
    """Return the files of a benchmark's split, in order; `folder` may also be one file.

    A file's name is the split's, with or without the number of a shard. Folders whose names begin
    with a dot are not searched.

    Raises:
      InputError: there are none, they lie in several folders, or shards are missing.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise errors.InputError(f"--from={folder}: no such folder")
    name = re.compile(re.escape(wanted.split) + _SHARD + f"({'|'.join(map(re.escape, _ENDINGS))})")
    matches = [
        path
        for path in sorted(folder.rglob("*"))
        if name.fullmatch(path.name)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (wanted.folders is None or _parents(path, folder) & set(wanted.folders))
    ]
    if not matches:
        where = "" if wanted.folders is None else f" in {' or '.join(filter(None, wanted.folders))}"
        raise errors.InputError(
            f"--from={folder}: holds no {wanted.split}*.parquet{where}, as {wanted.published} has"
        )
    parents = sorted({str(path.parent) for path in matches})
    if len(parents) > 1 or len({path.suffix for path in matches}) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in matches[:4])
        raise errors.InputError(
            f"--from={folder}: files of {wanted.split} in several places, name one: {names}"
        )
    _check_shards(matches)
    return matches


def suite(path: str) -> dict[str, str]:
    """Return the built folders in a folder by name, none if it is not a folder of such.

    Raises:
      InputError: it holds other things beside them.
    """
    with paths.explain(path):
        # What is no folder is for the reader of its kind, which also says that it is missing.
        if not path or not epath.Path(path).is_dir() or manifest.is_built(path):
            return {}
        inside = sorted(one for one in epath.Path(path).iterdir() if not one.name.startswith("."))
    built = {one.name: str(one) for one in inside if one.is_dir() and manifest.is_built(str(one))}
    others = [one.name for one in inside if one.name not in built]
    if built and others:
        raise errors.InputError(f"{path}: holds data sets, but also {others[0]}")
    return built


def table(path: pathlib.Path) -> parquet_tables.ParquetTable | json_tables.JsonTable:
    """Return the rows of a file."""
    if path.suffix == ".parquet":
        return parquet_tables.ParquetTable(str(path))
    if path.suffix in _ENDINGS:
        return json_tables.JsonTable(str(path))
    raise errors.InputError(f"{path}: must end in {', '.join(_ENDINGS)}")


def _parents(path: pathlib.Path, folder: pathlib.Path) -> set[str]:
    """Return the names of the folder that holds a file: the searched folder itself has no name."""
    # A user may name the folder of the configuration itself.
    return {"", path.parent.name} if path.parent == folder else {path.parent.name}


def _check_shards(matches: list[pathlib.Path]) -> None:
    """Raise InputError unless the numbered files are all there."""
    counts = [re.search(r"-(\d{5})-of-(\d{5})", path.name) for path in matches]
    numbered = [(int(match[1]), int(match[2])) for match in counts if match is not None]
    if not numbered:
        if len(matches) > 1:
            raise errors.InputError(f"{matches[0]} and {matches[1]}: one file holds a split")
        return
    expected = [(number, numbered[0][1]) for number in range(numbered[0][1])]
    if numbered != expected or len(numbered) != len(matches):
        names = ", ".join(path.name for path in matches)
        raise errors.InputError(
            f"{matches[0].parent}: must hold {numbered[0][1]} numbered files, got {names}"
        )
