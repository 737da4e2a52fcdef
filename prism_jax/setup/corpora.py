"""The data sets of a stage: opened and validated, with the rows that are left out listed."""

import contextlib
import hashlib
import itertools
import pathlib
import re
from collections.abc import Sequence

import jax

from prism_jax import errors, progress
from prism_jax.data import sources, validate
from prism_jax.setup import dropped_rows

_READER = re.compile(r"(?P<path>.*)@(?P<function>[^@]+\.py:\w+)", re.DOTALL)


def source(text: str, *, kind: str, image_root: str) -> sources.Source:
    """Return the data set that a configuration names.

    PATH, PATH#ENTRY of a dataset_info.json, PATH#SPLIT of a built folder, or
    PATH@FILE.py:FUNCTION, which reads it.

    Args:
      kind: of its rows: sft, pairs or prompts.
      image_root: folder of relative image paths; empty for the folder of the file.
    """
    reader = _READER.fullmatch(text)
    path, _, entry = (text if reader is None else reader["path"]).partition("#")
    return sources.Source(
        kind=kind,
        path=path,
        entry=entry or None,
        image_root=image_root or None,
        reader=None if reader is None else reader["function"],
    )


def open_all(
    texts: Sequence[str],
    rules: validate.Rules,
    *,
    kind: str,
    image_root: str,
    cache_dir: str,
    dropped: pathlib.Path | None,
) -> list[tuple[str, sources.Opened]]:
    """Open data sets; return each with its name.

    Args:
      cache_dir: where built folders on gs:// are copied to; empty for nowhere.
      dropped: JSON lines to write, one for each row that is left out; None to write none.

    Raises:
      InputError: a source cannot be read, or holds more wrong rows than the rules allow; all of
        them are named then.
    """
    parts, lines = [], ""
    # Every process reads all rows and would name the same ones.
    is_writer = jax.process_index() == 0
    for text in texts:
        data_set = source(text, kind=kind, image_root=image_root)
        naming = contextlib.nullcontext()
        if is_writer:
            naming = dropped_rows.named(dropped, earlier=lines)
        with naming:
            opened = sources.open_source(data_set, rules, cache_dir=cache_dir or None)
        report = opened.report
        summary = f"{text}: {report.num_kept} of {report.num_read} rows"
        counts = ", ".join(f"{reason} {count}" for reason, count in report.counts().items())
        progress.say(summary + (f"; left out: {counts}" if counts else ""))
        lines += report.lines()
        parts.append((data_set.label(), opened))
    if dropped is not None and is_writer:
        dropped.write_text(lines, encoding="utf-8")
    return parts


def joined(reports: Sequence[validate.Report]) -> validate.Report:
    """Return one report of all rows of several data sets."""
    if len(reports) == 1:
        return reports[0]
    starts = itertools.accumulate((report.num_kept for report in reports), initial=0)
    return validate.Report(
        name=" + ".join(report.name for report in reports),
        num_read=sum(report.num_read for report in reports),
        num_kept=sum(report.num_kept for report in reports),
        num_wrong=sum(report.num_wrong for report in reports),
        dropped=[row for report in reports for row in report.dropped],
        counted=[count for report in reports for count in report.counted],
        digests=bytearray().join(report.digests for report in reports),
        has_scales=any(report.has_scales for report in reports),
        has_videos=any(report.has_videos for report in reports),
        renamed={
            start + number: row_id
            for start, report in zip(starts, reports, strict=False)
            for number, row_id in report.renamed.items()
        },
    )


def digest(reports: Sequence[validate.Report], *, max_rows: int | None = None) -> str:
    """Return 16 hex digits that depend on the texts, the pictures and the order of the rows read.

    Args:
      max_rows: only the first rows of each data set count; None: all.
    """
    hashed = hashlib.sha256()
    for report in reports:
        hashed.update(report.first_digests(max_rows))
    return hashed.hexdigest()[:16]


def require_batch(num_rows: int, batch_rows: int, *, name: str, field: str) -> None:
    """Raise `InputError` when a data set has fewer rows than a step takes.

    Args:
      name: of the data set.
      field: the option that sets the rows of a step.
    """
    if num_rows < batch_rows:
        raise errors.InputError(
            f"{name}: {field} must be at most the {num_rows} rows there are to learn from, "
            f"got {batch_rows}"
        )
