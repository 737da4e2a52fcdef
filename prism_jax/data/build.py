"""Convert files of any published format to an ArrayRecord folder, all or nothing."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator

from etils import epath

from prism_jax import errors
from prism_jax.data import arrayrecord, manifest, paths, records, sources, validate


def build(source: sources.Source, out: str, rules: validate.Rules) -> manifest.Manifest:
    """Validate all rows of a source and write the valid rows to the folder `out`.

    The rows keep the order of the files. The folder appears under its name when it is complete; a
    killed build leaves a `.NAME.incomplete.*` folder beside it that may be deleted. The same
    source gives the same bytes. `dropped.jsonl` lists the rows that were left out.

    Raises:
      InputError: `out` exists, the source cannot be read, or more than `max_bad_rows` rows are
        wrong; nothing is written then.
    """
    files = sources.Files(source)
    names = [name.rsplit("/", 1)[-1] for name in files.names]
    return write(
        files.candidates(), out, rules, kind=source.kind, label=source.label(), names=names
    )


def write(
    candidates: Iterable[validate.Candidate],
    out: str,
    rules: validate.Rules,
    *,
    kind: str,
    label: str,
    names: list[str],
    through: Callable[[Iterator[records.Row]], Iterator[records.Row]] = iter,
) -> manifest.Manifest:
    """Validate rows and write the valid ones to the folder `out`; see `build`.

    Args:
      label: the source, for messages.
      names: of the files, for the manifest.
      through: passes the valid rows on, and may refuse them all.
    """
    with paths.explain(out):
        if epath.Path(out).exists():
            raise errors.InputError(f"{out}: must not exist yet")
    report = validate.Report(name=label)
    rows = through(row for _, row in validate.check(candidates, rules, report))
    with _workspace(out) as workspace:
        folder = arrayrecord.write(rows, kind=kind, folder=workspace)
        written = manifest.write(folder, kind=kind, report=report, sources=names)
        _commit(folder, out)
    return written


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
