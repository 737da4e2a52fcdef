"""Data sets of prompts: read, validated and measured."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Literal

import jax

from prism_jax import configuration
from prism_jax.data import encode, processor, records, sources, validate
from prism_jax.setup import corpora, dropped_rows

_DROPPED = "dropped_prompts.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """The rows of prompts, the size of each, and the report of the rows that are left out."""

    rows: sources.Rows
    lengths: Sequence[int]  # rows of each data set
    sizes: Sequence[encode.Size]
    report: validate.Report
    digest: str  # of texts, pictures and order of the rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules(configuration.Section):
    """The rules by which data sets of prompts are read and their rows are taken."""

    # Of pictures given by path; None: the folder of the file.
    image_root: str | None = configuration.free()
    cache_dir: str | None = configuration.free()  # where a folder on gs:// is copied to
    max_rows: int | None  # use only the first rows of a data set; None: all
    max_prompt_tokens: int  # image tokens included
    overlong: Literal["error", "filter"]  # for longer prompts
    max_bad_rows: int  # of a data set
    min_pixels: int | None  # of a picture, others are scaled; None: those of the checkpoint
    max_pixels: int | None
    limit_image_pixels: int  # of a picture's file; a larger one is a wrong row

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 1, "max_rows", "max_prompt_tokens", "min_pixels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts(Rules):
    """A data set of prompts: RL parquet, JSON lines, or a folder that `data build` wrote."""

    path: str = configuration.free()  # the rows themselves are compared

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.not_empty(self, "path") + super().problems()


def open_prompts(
    texts: Sequence[str],
    options: Rules,
    words: processor.Processor,
    *,
    need_teacher: bool,
    need_answer: bool,
    folder: pathlib.Path | None,
    check: Callable[[records.PromptRow], None] | None = None,
    place: str = "config",
) -> Opened:
    """Validate every row and measure its prompt; rows that are left out are counted by reason.

    Args:
      texts: the data sets, as a configuration names them; their rows count on from each other.
      need_teacher: rows need the teacher's caption and cot; for `need_answer` a ground truth.
      folder: gets `dropped_prompts.jsonl`, which lists them; None: standard error does.
      check: raises RowError for a row that is wrong in another way; called in threads.
      place: prefix of the section `prompts`, for messages.

    Raises:
      InputError: the data cannot be read, or more rows are wrong than allowed.
    """

    def count_tokens(row: records.PromptRow) -> tuple[int, int, int]:
        if check is not None:
            check(row)
        size = encode.measure(row.prompt, records.get_media(row), words, add_generation_prompt=True)
        return size.tokens, size.patches, size.images

    parts = corpora.open_all(
        texts,
        validate.Rules(
            max_bad_rows=options.max_bad_rows,
            option=f"{place}.prompts.max_bad_rows",
            count_tokens=count_tokens,
            max_tokens=options.max_prompt_tokens,
            overlong=options.overlong,
            limit_pixels=options.limit_image_pixels,
            need_teacher=need_teacher,
            need_answer=need_answer,
        ),
        kind="prompts",
        image_root=options.image_root or "",
        cache_dir=options.cache_dir or "",
        dropped=None if folder is None else folder / _DROPPED,
    )
    selections = []
    for _, opened in parts:
        if folder is None and jax.process_index() == 0:
            dropped_rows.print_rows(opened.report, None)
        selections.append(range(len(opened.rows))[: options.max_rows])
    counted = [
        counts
        for (_, opened), selection in zip(parts, selections, strict=True)
        for counts in opened.report.counted[: len(selection)]
    ]
    reports = [opened.report for _, opened in parts]
    return Opened(
        rows=sources.Joined(
            [
                sources.Selection(opened.rows, selection)
                for (_, opened), selection in zip(parts, selections, strict=True)
            ]
        ),
        lengths=tuple(len(selection) for selection in selections),
        sizes=[
            encode.Size(tokens=tokens, patches=patches, images=images)
            for tokens, patches, images in counted
        ],
        report=corpora.joined(reports),
        digest=corpora.digest(reports, max_rows=options.max_rows),
    )
