"""Show what a chain of stages did: `python -m prism_jax report --workdir=DIR --out=FILE.html`.

DIR is a chain's folder as `pipeline` writes it, finished or not; stages that are not there are
shown as not run. The page is one file that loads nothing: plots of accuracy, gaps, reward and loss,
tables, and a few prompts of the test split with the response of each stage.
"""

import argparse
import collections
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from prism_jax import errors, small_files
from prism_jax.data import images, records, sources, validate
from prism_jax.report import examples, honesty, page, results

Json = Any
_MAX_PICTURE_PIXELS = 640  # of the longer side


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    options = argparse.ArgumentParser(
        prog="python -m prism_jax report", description="Show what a chain of stages did."
    )
    add = options.add_argument
    add("--workdir", required=True, type=pathlib.Path, help="folder of the chain")
    add("--out", required=True, type=pathlib.Path, help="HTML file to write")
    add("--summary", type=pathlib.Path, help="JSON file to write, with the numbers alone")
    add("--title", help="of the page; the folder's name without")
    add("--num_examples", type=int, default=6, help="prompts to show with their responses")
    return options


def main(argv: Sequence[str]) -> None:
    """Write the report of one chain."""
    args = parser().parse_args(argv)
    if args.num_examples < 0:
        raise errors.InputError(f"--num_examples must be >= 0, got {args.num_examples}")
    found = results.read(args.workdir)
    if found.is_empty():
        raise errors.InputError(f"--workdir={args.workdir}: holds no stage of a chain")
    shown = choose(found, limit=args.num_examples)
    title = args.title or f"prism_jax: {args.workdir.resolve().name}"
    selection = "The first prompt of each type of question in the test split, not chosen by hand."
    text = page.build(found, shown, title=title, selection=selection)
    _write(args.out, text.encode("utf-8", "replace"))
    if args.summary is not None:
        told = results.summary(found) | {"honesty": honesty.summary(found)}
        _write(args.summary, small_files.dumps(told, indent=1) + b"\n")
    print(args.out)


def choose(found: results.Results, *, limit: int) -> list[examples.Example]:
    """Return the first prompt of each type of question with the stages' responses."""
    run = {stage: one for stage, one in found.evaluations.items() if one is not None}
    if not run or not limit:
        return []
    told = {stage: _responses(one) for stage, one in run.items()}
    first_of_type: dict[str | None, Mapping[str, Json]] = {}
    for record in next(iter(told.values())).values():
        first_of_type.setdefault(record["question_type"], record)
    # One after another of the types; more prompts are shown where there are few types.
    chosen = list(first_of_type.values())[:limit]
    prompts = _prompts(next(iter(run.values())), {record["id"] for record in chosen})
    return [
        _example(record, {s: lines.get(record["id"]) for s, lines in told.items()}, prompts)
        for record in chosen
    ]


def _responses(one: results.Evaluation) -> dict[str, Mapping[str, Json]]:
    """Return the first response to each prompt by its id, in order."""
    found: dict[str, Mapping[str, Json]] = collections.OrderedDict()
    for record in small_files.read_lines(one.responses, results.RESPONSE):
        if record["draw"] == one.draw and record["response_number"] == 0:
            found[record["id"]] = record
    return found


def _prompts(one: results.Evaluation, ids: set[str]) -> dict[str, records.PromptRow]:
    """Return rows of the test split by id; none where it is not there any more."""
    if not pathlib.Path(one.prompts_path).exists():
        return {}
    source = sources.Source(kind="prompts", path=one.prompts_path, image_root=one.image_root)
    # The evaluation has read these rows: one that is wrong now is left out of the page.
    opened = sources.open_source(source, validate.Rules(max_bad_rows=10**9), cache_dir=None)
    found = {}
    for number in range(len(opened.rows)):
        row = opened.rows[number]
        if row.id in ids:
            found[row.id] = row
        if len(found) == len(ids):
            break
    return found


def _example(
    record: Mapping[str, Json],
    told: Mapping[str, Mapping[str, Json] | None],
    prompts: Mapping[str, records.PromptRow],
) -> examples.Example:
    row = prompts.get(record["id"])
    return examples.Example(
        id=record["id"],
        question_type=record["question_type"],
        question=None if row is None else _question(row),
        ground_truth=record["ground_truth"],
        pictures=() if row is None else tuple(map(_picture, row.images)),
        has_pictures=row is not None,
        responses={
            stage: examples.Response(text=one["response"], reason=one["reason"], ended=one["ended"])
            for stage, one in told.items()
            if one is not None
        },
    )


def _question(row: records.PromptRow) -> str:
    turns = [turn.content for turn in row.prompt if turn.role == "user"]
    return turns[-1].replace(records.IMAGE_MARK, "").strip()


def _picture(image: records.Image) -> examples.Picture:
    opened = images.open_stored(image)
    opened.thumbnail((_MAX_PICTURE_PIXELS, _MAX_PICTURE_PIXELS))
    written = io.BytesIO()
    opened.save(written, "PNG")
    return examples.Picture(png=written.getvalue(), width=opened.width, height=opened.height)


def _write(path: pathlib.Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    try:
        small_files.replace(path, content)
    except OSError as error:
        raise errors.InputError(f"{path}: cannot be written: {error}") from error
