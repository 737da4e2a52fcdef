"""Data sets: `python -m prism_jax data numerals --out=DIR`, `… data build --from=PATH --to=DIR`.

`benchmark` reads a published benchmark for `evaluate` (docs/benchmarks.md).
`tokenizer` trains a small tokenizer on the language of `numerals`, for a model trained from
scratch. `numerals` writes the embedded corpus in the published formats (docs/numerals.md). `build`
validates files of any published format and writes one ArrayRecord folder, which training reads
faster and without checking it again. All run on a CPU, and the same arguments give the same bytes.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from prism_jax import errors
from prism_jax.data import build, images, records, sources, tokenizer_files, validate
from prism_jax.data.benchmarks import catalog, convert
from prism_jax.data.numerals import corpus as numerals_corpus
from prism_jax.data.numerals import examples as numerals_examples
from prism_jax.rewards import answer
from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.setup import corpora, dropped_rows

T = TypeVar("T", int, float)


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    options = argparse.ArgumentParser(
        prog="python -m prism_jax data", description="Make data sets."
    )
    parts = options.add_subparsers(dest="part", required=True)
    corpus = parts.add_parser("numerals", help="write the embedded corpus").add_argument
    corpus("--out", required=True, help="new folder; one with the same arguments is kept")
    corpus("--level", default="tiny", help="tiny or small")
    corpus("--seed", type=int, default=0)
    corpus(
        "--rows",
        action="append",
        default=[],
        metavar="PART=COUNT",
        help=f"instead of the level's count; parts are {', '.join(numerals_examples.STREAMS)}",
    )
    corpus(
        "--slips",
        action="append",
        default=[],
        metavar="NAME=RATE",
        help="of the public demonstrations, instead of the level's: perception, arithmetic, habit",
    )
    corpus(
        "--num_processes", type=int, default=os.cpu_count(), help="at most; the rows are the same"
    )
    words = parts.add_parser("tokenizer", help="train one on the corpus's language").add_argument
    words("--out", required=True, help="folder that gets the tokenizer's and processor's files")
    words("--level", default="tiny", help="tiny or small")
    words(
        "--num_texts", type=int, default=4000, help="of the corpus, from which merges are learned"
    )
    words("--num_merges", type=int, default=1024, help="most merges; few words need fewer")
    words("--min_pixels", type=int, default=32 * 32, help="a smaller picture is scaled up")
    words("--max_pixels", type=int, default=512 * 512, help="a larger picture is scaled down")
    _add_build(parts)
    _add_benchmark(parts)
    return options


def _add_build(parts: argparse._SubParsersAction) -> None:
    built = parts.add_parser(
        "build",
        help="validate files and write ArrayRecord",
        description="Validate every row of files and write the right ones as ArrayRecord. How many "
        "tokens a row has depends on the model that reads it: rows that are too long are found "
        "when a stage opens the data, see overlong in its configuration.",
    ).add_argument
    built(
        "--from",
        required=True,
        dest="source",
        help="PATH, PATH#ENTRY of a dataset_info.json, or "
        "PATH@FILE.py:FUNCTION, a function of yours that reads it",
    )
    built("--to", required=True, dest="target", help="new folder, local or gs://")
    built("--split", default="train", metavar="NAME", help="the name of these rows")
    built(
        "--also",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a further split, PATH as in --from; a stage reads it as FOLDER#NAME",
    )
    built("--kind", required=True, choices=records.KINDS, help="the kind of the rows")
    built("--image_root", default="", help="of relative image paths; the file's folder without")
    built("--max_bad_rows", type=int, default=0, help="wrong rows that may be left out")
    built(
        "--limit_image_pixels",
        type=int,
        default=images.LIMIT_PIXELS,
        help=f"of one picture; at most {images.LARGEST_LIMIT_PIXELS}. Each stage has its limit in "
        "its configuration, limit_image_pixels",
    )
    built("--need_teacher", action="store_true", help="prompts need the teacher's texts")
    built("--need_answer", action="store_true", help="prompts need an answer that can be judged")


def _add_benchmark(parts: Any) -> None:
    """Add the options of `data benchmark`."""
    published = ", ".join(f"{name}: {one.published}" for name, one in catalog.LAYOUTS.items())
    add = parts.add_parser(
        "benchmark",
        help="read a published benchmark for evaluate",
        description=f"Write a published benchmark as ArrayRecord for `evaluate`. {published}.",
    ).add_argument
    add("name", choices=tuple(catalog.LAYOUTS))
    add("--from", required=True, dest="source", help="folder as the hub publishes it, or its file")
    add("--to", required=True, dest="target", help="new folder, local or gs://")
    add(
        "--scorer",
        choices=facts_lib.PROTOCOLS,
        default="prism",
        help="prompts, limits and scorer: of PRISM's evaluation, or of lmms-eval and the benchmark",
    )
    add("--max_bad_rows", type=int, default=0, help="wrong rows that may be left out")
    add(
        "--limit_image_pixels",
        type=int,
        default=images.LIMIT_PIXELS,
        help=f"of one picture; at most {images.LARGEST_LIMIT_PIXELS}",
    )


def main(argv: Sequence[str]) -> None:
    """Write one data set; its summary goes to standard output as JSON."""
    args = parser().parse_args(argv)
    if args.part == "numerals":
        rows = numerals_corpus.rows_of(
            args.level, dict(_pair(text, "rows", int) for text in args.rows)
        )
        slips = numerals_corpus.slips_of(
            args.level, dict(_pair(t, "slips", float) for t in args.slips)
        )
        if args.num_processes < 1:
            raise errors.InputError(f"--num_processes must be >= 1, got {args.num_processes}")
        manifest = numerals_corpus.write(
            args.out,
            level=args.level,
            seed=args.seed,
            rows=rows,
            slips=slips,
            num_processes=args.num_processes,
        )
        summary = {"out": args.out, "parts": manifest["parts"]}
    elif args.part == "tokenizer":
        summary = {"out": args.out} | _tokenizer(args)
    elif args.part == "benchmark":
        rules = validate.Rules(
            max_bad_rows=args.max_bad_rows,
            option="--max_bad_rows",
            limit_pixels=args.limit_image_pixels,
            need_answer=True,
        )
        with dropped_rows.named(None):
            written = convert.convert(
                catalog.LAYOUTS[args.name], args.source, args.target, rules, protocol=args.scorer
            )
        summary = {"out": args.target, "scorer": args.scorer} | written.reports["test"]
    else:
        rules = validate.Rules(
            max_bad_rows=args.max_bad_rows,
            option="--max_bad_rows",
            limit_pixels=args.limit_image_pixels,
            need_teacher=args.need_teacher,
            need_answer=args.need_answer,
            answer_problem=answer.check_ground_truth,
        )
        summary = {"out": args.target} | _build(args, rules)
    json.dump(summary, sys.stdout, indent=1)
    sys.stdout.write("\n")


def _build(args: argparse.Namespace, rules: validate.Rules) -> dict[str, Any]:
    """Build a folder; return the report on the rows of `--from`, and on those of each split."""

    def source(path: str) -> sources.Source:
        return corpora.source(path, kind=args.kind, image_root=args.image_root)

    also: dict[str, sources.Source] = {}
    for text in args.also:
        name, separator, path = text.partition("=")
        if not separator or not path or name in also:
            raise errors.InputError(f"--also={text}: must be NAME=PATH, each name once")
        also[name] = source(path)
    with dropped_rows.named(None):  # no file lists the dropped rows here
        written = build.build(source(args.source), args.target, rules, split=args.split, also=also)
    return written.reports[args.split] | ({"splits": written.reports} if also else {})


def _tokenizer(args: argparse.Namespace) -> dict[str, int]:
    """Write the files of a tokenizer; return its ids."""
    numbers = {
        "num_texts": args.num_texts,
        "num_merges": args.num_merges,
        "min_pixels": args.min_pixels,
    }
    for name, value in numbers.items():
        if value < 1:
            raise errors.InputError(f"--{name} must be >= 1, got {value}")
    if args.max_pixels < args.min_pixels:
        raise errors.InputError(
            f"--max_pixels must be >= --min_pixels, got {args.max_pixels} and {args.min_pixels}"
        )
    if pathlib.Path(args.out, "tokenizer.json").exists():
        raise errors.InputError(f"--out={args.out}: holds a tokenizer.json already")
    ids = tokenizer_files.write(
        args.out,
        numerals_corpus.sample_texts(args.level, 0, args.num_texts),
        num_merges=args.num_merges,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
    )
    return dataclasses.asdict(ids)


def _pair(text: str, option: str, kind: Callable[[str], T]) -> tuple[str, T]:
    """Return the name and the number of NAME=NUMBER."""
    name, _, number = text.partition("=")
    try:
        return name, kind(number)
    except ValueError as error:
        raise errors.InputError(f"--{option}={text}: must be NAME=NUMBER") from error
