"""Open data sets for training, with their rows validated.

A source is a file (`.json`, `.jsonl`, `.parquet`), a folder of such files, an entry of a
LLaMA-Factory `dataset_info.json`, a folder that `build.build` wrote, or anything with a function of
the user's that reads it. Files and the folder built from them give the same rows in the same order.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, SupportsIndex

from etils import epath

from prism_jax import errors, user_functions
from prism_jax.data import (
    json_tables,
    manifest,
    pairs,
    parquet_tables,
    paths,
    records,
    rl_parquet,
    row_images,
    sharegpt,
    user_tables,
    validate,
    video_files,
)

_ENDINGS = (".json", ".jsonl", ".parquet")


class Rows(Protocol):
    """Typed rows by number, the form that Grain reads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> records.Row: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A data set as a user names it.

    Attributes:
      kind: of its rows: sft, pairs or prompts.
      path: a file, a folder of files, a `dataset_info.json` (with `entry`), or a built folder.
      entry: the data set's name in `dataset_info.json`, or the split of a built folder.
      image_root: the folder that image paths are relative to and must stay in; None: the folder of
        the file.
      name: in reports and rows; None: `entry`, or the last part of the path.
      reader: FILE.py:FUNCTION that gives the rows, see `reader_process`; None: as the path ends.
    """

    kind: str
    path: str
    entry: str | None = None
    image_root: str | None = None
    name: str | None = None
    reader: str | None = None

    def __post_init__(self):
        if self.kind not in records.KINDS:
            known = ", ".join(records.KINDS)
            raise errors.InputError(f"data.kind must be one of {known}, got {self.kind!r}")
        if not self.path:
            raise errors.InputError("data.path must name a file or folder, got an empty path")

    def label(self) -> str:
        """Return the name in reports and rows."""
        last = self.path.rstrip("/").rsplit("/", 1)[-1]
        return self.name or self.entry or last.removesuffix(".parquet").split(".json")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A validated data set and the report on its rows."""

    rows: Rows
    report: validate.Report


class Files:
    """The files of a source: candidates in order, then raw rows by number."""

    def __init__(self, source: Source):
        columns = None
        if source.reader is None:
            columns, names = _files(source)
            self._tables = [_table(name) for name in names]
        else:
            names, self._tables = [source.path], [_user_table(source)]
        self.names = names
        self.source = source
        self._labels = _labels(names)
        is_folder = source.reader is not None and paths.is_folder(source.path)
        parents = [source.path] if is_folder else [paths.parent(name) for name in names]
        self._roots = [source.image_root or folder for folder in parents]
        self._parse = _parser(source, columns)
        self._ends: list[int] = []

    def candidates(self) -> Iterator[validate.Candidate]:
        """Yield all rows of all files, wrong rows included."""
        index = itertools.count()
        for table, label, root in zip(self._tables, self._labels, self._roots, strict=True):
            for number, fields in table.scan():
                yield validate.Candidate(
                    index=next(index),
                    place=records.Place(file=label, row=number),
                    fields=fields,
                    parse=self._parse,
                    image_root=root,
                )
        self._ends = list(itertools.accumulate(len(table) for table in self._tables))

    def read(self, index: int) -> tuple[records.Row, str]:
        """Return a row by its candidate index, without its images' bytes, and its image root."""
        table = bisect.bisect_right(self._ends, index)
        start = self._ends[table - 1] if table else 0
        number, fields = self._tables[table].read(index - start)
        if isinstance(fields, records.RowError):
            raise fields
        place = records.Place(file=self._labels[table], row=number)
        return self._parse(fields, place=place), self._roots[table]


class RawRows:
    """The valid rows of a source's files, by number. Thread-safe."""

    def __init__(self, files: Files, rules: validate.Rules, report: validate.Report):
        self._files = files
        self._rules = rules
        self._report = report
        self._indices: list[int] = []
        # All of each picture and video but the bytes.
        self._media: list[tuple[records.Image | records.Video, ...]] = []
        for candidate, row in validate.check(files.candidates(), rules, report):
            self._indices.append(candidate.index)
            bare = [dataclasses.replace(file, data=None) for file in records.get_files(row)]
            self._media.append(records.get_media(records.replace_files(row, bare)))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> records.Row:
        index = range(len(self._indices))[index]
        row, root = self._files.read(self._indices[index])
        files = records.get_files(row)
        row = records.replace_media(row, self._media[index])
        loaded = []
        for given, known in zip(files, records.get_files(row), strict=True):
            # The limit of each kind was checked when the rows were validated.
            data = row_images.read_bytes(given, root, limit_bytes=video_files.LIMIT_BYTES)
            if hashlib.sha256(data).hexdigest() != known.sha256:
                raise errors.InputError(
                    f"{row.id}: image {known.path} has changed since it was read"
                )
            loaded.append(dataclasses.replace(known, data=data))
        row = records.replace_files(row, loaded)
        if records.digest(row) != self._report.digest_of(index):
            raise errors.InputError(f"{row.id}: the row has changed since it was read")
        row_id = self._report.renamed.get(index)
        return row if row_id is None else dataclasses.replace(row, id=row_id)


class Selection:
    """A selection of the rows of a data set."""

    def __init__(self, rows: Rows, numbers: Sequence[int]):
        self._rows = rows
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: SupportsIndex) -> records.Row:
        return self._rows[self._numbers[int(index)]]


class Joined:
    """The rows of several data sets, numbered consecutively."""

    def __init__(self, parts: Sequence[Rows]):
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: SupportsIndex) -> records.Row:
        number = range(len(self))[index]
        part = bisect.bisect_right(self._ends, number)
        return self._parts[part][number - (self._ends[part] - len(self._parts[part]))]


def open_source(source: Source, rules: validate.Rules, *, cache_dir: str | None) -> Opened:
    """Open a data set for training; files are validated, a built folder was when it was built.

    The rows of a built folder are checked again if the stage has rules on length, teacher texts or
    ground truth. `cache_dir` is for copies of built folders on gs://.
    """
    report = validate.Report(name=source.label())
    if source.reader is None and paths.is_folder(source.path) and manifest.is_built(source.path):
        rows = manifest.open_folder(
            source.path, kind=source.kind, split=source.entry, cache_dir=cache_dir
        )
        return Opened(rows=_select(rows, source, rules, report), report=report)
    return Opened(rows=RawRows(Files(source), rules, report), report=report)


def _select(rows: Rows, source: Source, rules: validate.Rules, report: validate.Report) -> Rows:
    if rules.count_tokens is None and not rules.need_teacher and not rules.need_answer:
        report.num_read = report.num_kept = len(rows)
        return rows
    numbers = validate.recheck(rows, rules, report, file=source.path)
    return rows if len(numbers) == len(rows) else Selection(rows, numbers)


def _table(name: str) -> parquet_tables.ParquetTable | json_tables.JsonTable:
    if name.endswith(".parquet"):
        return parquet_tables.ParquetTable(name)
    return json_tables.JsonTable(name)


def _user_table(source: Source) -> user_tables.UserTable:
    if source.entry is not None:
        raise errors.InputError(
            f"{source.path}: an entry and a reader cannot both be given, got {source.entry} and "
            f"{source.reader}"
        )
    function = user_functions.find(source.reader, field=f"{source.path}@READER")
    return user_tables.UserTable(source.path, function)


def _files(source: Source) -> tuple[sharegpt.Columns | None, list[str]]:
    """Return the column names (None: each row's variant) and the files to read."""
    path, columns = source.path, None
    if paths.is_folder(path) and source.entry is not None:
        path = paths.join(path, sharegpt.DATASET_INFO)
    if source.entry is not None:
        if not path.endswith(sharegpt.DATASET_INFO) or source.kind != "sft":
            raise errors.InputError(
                f"{path}: data.entry names a data set of kind sft in a {sharegpt.DATASET_INFO}, "
                f"got kind {source.kind}"
            )
        entry = sharegpt.find_entry(path, source.entry)
        path, columns = entry.path, entry.columns
    elif path.endswith(sharegpt.DATASET_INFO):
        raise errors.InputError(f"{path}: data.entry must name one of its data sets")
    if not paths.is_folder(path):
        names = [path]
    else:
        with paths.explain(path):
            files = (os.fspath(file) for file in epath.Path(path).iterdir())
            names = sorted(
                n for n in files if n.endswith(_ENDINGS) and sharegpt.DATASET_INFO not in n
            )
    if not names or not all(name.endswith(_ENDINGS) for name in names):
        raise errors.InputError(f"{path}: must be (or hold) files ending in {', '.join(_ENDINGS)}")
    return columns, names


def _labels(names: list[str]) -> list[str]:
    """Return file names for messages, without folders if that is unambiguous."""
    short = [name.rsplit("/", 1)[-1] for name in names]
    return short if len(set(short)) == len(short) else names


def _parser(source: Source, columns: sharegpt.Columns | None) -> Callable[..., records.Row]:
    name = source.label()
    if source.kind == "sft":
        return functools.partial(sharegpt.parse, source=name, columns=columns)
    return functools.partial(
        pairs.parse if source.kind == "pairs" else rl_parquet.parse, source=name
    )
