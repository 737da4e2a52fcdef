"""Show what a chain of stages did: `python -m prism_jax report --workdir=DIR --out=FILE.html`.

DIR is a chain's folder as `pipeline` writes it, finished or not; a missing stage is shown as not
run. The page is one file that loads no other: plots of accuracy, gaps, reward and loss, tables, and
a few prompts of the test split with the response of each stage.
"""

import argparse
import collections
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
    add("--title", help="of the page; default: the folder's name")
    add("--num_examples", type=int, default=6, help="prompts to show with their responses")
    return options


def main(argv: Sequence[str]) -> None:
    """Write the report of one chain."""
    args = parser().parse_args(argv)
    if args.num_examples < 0:
        raise errors.InputError(f"--num_examples must be >= 0, got {args.num_examples}")
    chain = results.read(args.workdir)
    if chain.is_empty():
        raise errors.InputError(f"--workdir={args.workdir}: holds no stage of a chain")
    shown = choose(chain, limit=args.num_examples)
    title = args.title or f"prism_jax: {args.workdir.resolve().name}"
    selection = "The first prompt of each type of question in the test split, not chosen by hand."
    text = page.build(chain, shown, title=title, selection=selection)
    _write(args.out, text.encode("utf-8", "replace"))
    if args.summary is not None:
        summary = results.summary(chain) | {"honesty": honesty.summary(chain)}
        _write(args.summary, small_files.dumps(summary, indent=1) + b"\n")
    print(args.out)


def choose(chain: results.Results, *, limit: int) -> list[examples.Example]:
    """Return the first prompt of each type of question, with each stage's response."""
    evaluations = {
        stage: evaluation
        for stage, evaluation in chain.evaluations.items()
        if evaluation is not None
    }
    if not evaluations or not limit:
        return []
    responses = {stage: _responses(evaluation) for stage, evaluation in evaluations.items()}
    first_of_type: dict[str | None, Mapping[str, Json]] = {}
    for record in next(iter(responses.values())).values():
        first_of_type.setdefault(record["question_type"], record)
    shown = list(first_of_type.values())[:limit]
    prompts = _prompts(next(iter(evaluations.values())), {record["id"] for record in shown})
    return [
        _example(record, {s: lines.get(record["id"]) for s, lines in responses.items()}, prompts)
        for record in shown
    ]


def _responses(evaluation: results.Evaluation) -> dict[str, Mapping[str, Json]]:
    """Return the first response to each prompt by its id, in order."""
    first_responses: dict[str, Mapping[str, Json]] = collections.OrderedDict()
    for record in small_files.read_lines(evaluation.responses, results.RESPONSE):
        if record["draw"] == evaluation.draw and record["response_number"] == 0:
            first_responses[record["id"]] = record
    return first_responses


def _prompts(evaluation: results.Evaluation, ids: set[str]) -> dict[str, records.PromptRow]:
    """Return rows of the test split by id; none when the split is gone."""
    if not pathlib.Path(evaluation.prompts_path).exists():
        return {}
    source = sources.Source(
        kind="prompts", path=evaluation.prompts_path, image_root=evaluation.image_root
    )
    # The evaluation has read these rows, so one that is wrong now is left out, not refused.
    opened = sources.open_source(source, validate.Rules(max_bad_rows=10**9), cache_dir=None)
    rows = {}
    for number in range(len(opened.rows)):
        row = opened.rows[number]
        if row.id in ids:
            rows[row.id] = row
        if len(rows) == len(ids):
            break
    return rows


def _example(
    record: Mapping[str, Json],
    responses: Mapping[str, Mapping[str, Json] | None],
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
            stage: examples.Response(
                text=response["response"], reason=response["reason"], ended=response["ended"]
            )
            for stage, response in responses.items()
            if response is not None
        },
    )


def _question(row: records.PromptRow) -> str:
    turns = [turn.content for turn in row.prompt if turn.role == "user"]
    return turns[-1].replace(records.IMAGE_MARK, "").strip()


def _picture(image: records.Image) -> examples.Picture:
    png, width, height = images.thumbnail(image, side_pixels=_MAX_PICTURE_PIXELS)
    return examples.Picture(png=png, width=width, height=height)


def _write(path: pathlib.Path, content: bytes) -> None:
    """Write a file as a whole or not at all."""
    try:
        small_files.replace(path, content)
    except OSError as error:
        raise errors.InputError(f"{path}: cannot be written: {error}") from error
