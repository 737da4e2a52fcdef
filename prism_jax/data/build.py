"""Convert files of any published format to an ArrayRecord folder, all or nothing."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping

from etils import epath

from prism_jax import errors
from prism_jax.data import arrayrecord, manifest, paths, records, sources, tfds_builders, validate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The rows of a split, not yet validated."""

    candidates: Iterable[validate.Candidate]
    label: str  # the source, for messages
    names: list[str]  # of the files, for the manifest
    # Passes the valid rows on, and may refuse them all.
    through: Callable[[Iterator[records.Row]], Iterator[records.Row]] = iter


def build(
    source: sources.Source,
    out: str,
    rules: validate.Rules,
    *,
    split: str = arrayrecord.SPLIT,
    also: Mapping[str, sources.Source] | None = None,
) -> manifest.Manifest:
    """Validate all rows of a source and write the valid rows to the folder `out`.

    The rows keep the order of the files. The folder appears under its name when it is complete; a
    killed build leaves a `.NAME.incomplete.*` folder beside it that may be deleted. The same
    source gives the same bytes. `dropped.jsonl` lists the rows that were left out.

    Args:
      split: the name of the source's rows.
      also: further splits of the same kind.

    Raises:
      InputError: `out` exists, a source cannot be read, or more than `max_bad_rows` rows of one are
        wrong; nothing is written then.
    """
    given = {split: source, **(also or {})}
    if len(given) != 1 + len(also or {}):
        raise errors.InputError(f"two sources are given for the split {split}")
    return write(
        {name: _part(named) for name, named in given.items()}, out, rules, kind=source.kind
    )


def _part(source: sources.Source) -> Part:
    files = sources.Files(source)
    names = [name.rsplit("/", 1)[-1] for name in files.names]
    return Part(candidates=files.candidates(), label=source.label(), names=names)


def write(
    parts: Mapping[str, Part], out: str, rules: validate.Rules, *, kind: str
) -> manifest.Manifest:
    """Validate the rows of each split and write the valid ones to the folder `out`; see `build`."""
    for name in parts:
        manifest.check_split(name)
    with paths.explain(out):
        if epath.Path(out).exists():
            raise errors.InputError(f"{out}: must not exist yet")
    reports = {name: validate.Report(name=part.label) for name, part in parts.items()}
    splits = {name: _valid_rows(part, rules, reports[name]) for name, part in parts.items()}
    with _workspace(out) as workspace:
        folder = tfds_builders.write(splits, kind=kind, folder=workspace)
        names = [name for part in parts.values() for name in part.names]
        written = manifest.write(folder, kind=kind, reports=reports, sources=names)
        _commit(folder, out)
    return written


def _valid_rows(
    part: Part, rules: validate.Rules, report: validate.Report
) -> Iterator[records.Row]:
    return part.through(row for _, row in validate.check(part.candidates, rules, report))


@contextlib.contextmanager
def _workspace(out: str) -> Iterator[str]:
    """Create a temporary folder, beside `out` if that is local, and remove it at the end."""
    parent = None
    if not paths.is_remote(out):
        parent = pathlib.Path(out).absolute().parent
    with paths.explain(out):
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        name = out.rstrip("/").rsplit("/", 1)[-1]
        workspace = tempfile.mkdtemp(prefix=f".{name}.incomplete.", dir=parent)
    try:
        yield workspace
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _commit(folder: str, out: str) -> None:
    with paths.explain(out):
        if not paths.is_remote(out):
            os.rename(folder, out)
            return
        target = epath.Path(out)
        target.mkdir(parents=True)
        names = sorted(os.listdir(folder), key=lambda name: name == manifest.FILE)
        for name in names:  # The manifest comes last: it marks a complete data set.
            epath.Path(folder, name).copy(target / name)
