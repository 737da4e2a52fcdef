"""Show the results of a chain: `python -m prism_jax report --workdir=DIR --out=FILE.html`.

DIR is a chain's folder as `pipeline` writes it, finished or not; a missing stage is shown as not
run. The page is one file that loads no other: plots of accuracy, gaps, reward and loss, tables, and
a few prompts of the test split with the response of each stage. DIR may also be that of a suite of
benchmarks (`evaluate`): then it shows their scores and a few prompts of each.
"""

import argparse
import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from prism_jax import errors, small_files
from prism_jax.commands import report_rows
from prism_jax.commands.benchmarks import suite
from prism_jax.data import records
from prism_jax.report import benchmarks, examples, honesty, page, results

Json = Any


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    options = argparse.ArgumentParser(
        prog="python -m prism_jax report", description="Show the results of a chain."
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
    if (args.workdir / suite.FILE).is_file():
        _write_suite(args)
        return
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


def _write_suite(args: argparse.Namespace) -> None:
    """Write the page about a suite of benchmarks."""
    content = small_files.read(args.workdir / suite.FILE, benchmarks.SUITE)
    shown = {}
    for name in content["benchmarks"]:
        folder = args.workdir / name
        lines = small_files.read_lines(folder / "responses.jsonl", benchmarks.RESPONSE)
        first = list({line["id"]: line for line in reversed(lines)}.values())[::-1]
        run = small_files.read(folder / "run.json", benchmarks.IDENTITY)
        chosen = first[: args.num_examples]
        prompts = run["config"]["prompts"] if run is not None else None
        ids = {line["id"] for line in chosen}
        rows = {} if prompts is None else report_rows.read(prompts["path"], None, ids)
        shown[name] = [
            benchmarks.Example(
                line=line,
                question=records.get_question(rows[line["id"]]) if line["id"] in rows else None,
                pictures=tuple(map(report_rows.picture, rows[line["id"]].images))
                if line["id"] in rows
                else (),
            )
            for line in chosen
        ]
    title = args.title or f"prism_jax: {args.workdir.resolve().name}"
    text = benchmarks.build(content, suite.cells(content["benchmarks"]), shown, title=title)
    _write(args.out, text.encode("utf-8", "replace"))
    if args.summary is not None:
        _write(args.summary, small_files.dumps(content, indent=1) + b"\n")
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
    first = next(iter(evaluations.values()))
    ids = {record["id"] for record in shown}
    prompts = report_rows.read(first.prompts_path, first.image_root, ids)
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


def _example(
    record: Mapping[str, Json],
    responses: Mapping[str, Mapping[str, Json] | None],
    prompts: Mapping[str, records.PromptRow],
) -> examples.Example:
    row = prompts.get(record["id"])
    return examples.Example(
        id=record["id"],
        question_type=record["question_type"],
        question=None if row is None else records.get_question(row),
        ground_truth=record["ground_truth"],
        pictures=() if row is None else tuple(map(report_rows.picture, row.images)),
        has_pictures=row is not None,
        responses={
            stage: examples.Response(
                text=response["response"], reason=response["reason"], ended=response["ended"]
            )
            for stage, response in responses.items()
            if response is not None
        },
    )


def _write(path: pathlib.Path, content: bytes) -> None:
    """Write a file as a whole or not at all."""
    try:
        small_files.replace(path, content)
    except OSError as error:
        raise errors.InputError(f"{path}: cannot be written: {error}") from error
