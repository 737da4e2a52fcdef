"""Look into a data set: `python -m prism_jax audit --data=PATH --kind=sft --out=audit.html`.

The page shows what the rows hold (lengths, pictures, formats of responses) and what is wrong with
them: rows that cannot be read, responses that look cut, repeated prompts, ground truths that the
judge does not accept as answers, and rows that a test set has as well, by question and by picture.
It is one HTML file that loads no other; the numbers stand beside it as JSON. Runs on a CPU.
"""

import argparse
import pathlib
from collections.abc import Sequence

from prism_jax import errors, small_files
from prism_jax.commands.audit import findings, page, survey, texts
from prism_jax.data import images, processor, records
from prism_jax.report import examples
from prism_jax.rewards import score, workers
from prism_jax.setup import corpora

_SIDE_PIXELS = 320  # of a picture on the page
_TEXT_CHARS = 4000
_DEADLINE_SECONDS = 10.0
_MEMORY_BYTES = 2 << 30


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    options = argparse.ArgumentParser(
        prog="python -m prism_jax audit", description="Look into a data set."
    )
    add = options.add_argument
    add(
        "--data",
        required=True,
        action="append",
        help="PATH, PATH#ENTRY of a dataset_info.json, or PATH@FILE.py:FUNCTION; may be repeated",
    )
    add("--kind", required=True, choices=records.KINDS, help="what the rows are")
    add(
        "--against",
        action="append",
        default=[],
        help="a test set that the rows must have nothing of; may be repeated",
    )
    add("--against_kind", default="prompts", choices=records.KINDS, help="what its rows are")
    add("--out", required=True, type=pathlib.Path, help="HTML file to write; FILE.json beside it")
    add("--model", help="Hugging Face folder whose tokenizer counts tokens; without it characters")
    add("--min_pixels", type=int, help="of a picture, as in training; default: the folder's")
    add("--max_pixels", type=int, help="the same")
    add("--image_root", default="", help="of relative image paths; the file's folder without")
    add("--judge", default="strict", choices=("strict", "official"), help="of ground truths")
    add("--num_workers", type=int, default=2, help="judging processes")
    add("--limit_image_pixels", type=int, default=images.LIMIT_PIXELS, help="of one picture")
    add("--num_examples", type=int, default=3, help="rows shown of each finding")
    add("--title", help="of the page; default: the paths")
    return options


def main(argv: Sequence[str]) -> None:
    """Write the page and the numbers of one audit."""
    args = parser().parse_args(argv)
    if args.num_examples < 0:
        raise errors.InputError(f"--num_examples must be >= 0, got {args.num_examples}")
    if args.out.suffix == ".json":
        raise errors.InputError(f"--out={args.out}: must be the HTML file, the JSON lies beside it")
    words = None
    if args.model is not None:
        bounds = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
        words = processor.Processor.from_folder(args.model, **bounds, place="--")
    data, tests = (
        survey.survey(
            [(t, corpora.source(t, kind=kind, image_root=root)) for t in given],
            words=tokenizer,
            limit_pixels=args.limit_image_pixels,
        )
        for given, kind, root, tokenizer in (
            (args.data, args.kind, args.image_root, words),
            (args.against, args.against_kind, "", None),
        )
    )
    rows = [facts for part in data for facts in part.facts]
    problems, right = _judged(args, rows, [(part.name, part.facts) for part in tests])
    audit = page.Audit(
        title=args.title or "Audit of " + ", ".join(args.data),
        kind=args.kind,
        data=tuple(data),
        tests=tuple(tests),
        findings=tuple(problems),
        teachers_right=tuple(right),
        has_tokens=words is not None,
    )
    text = page.build(audit, lambda facts: _shown(data, facts), num_examples=args.num_examples)
    _write(args.out, text.encode("utf-8", "replace"))
    _write(args.out.with_suffix(".json"), small_files.dumps(page.summary(audit), indent=1) + b"\n")
    for one in problems:
        print(f"{one.name}: {len(one.rows)}")
    print(args.out)


def _judged(
    args: argparse.Namespace,
    rows: Sequence[survey.Facts],
    tests: Sequence[tuple[str, Sequence[survey.Facts]]],
) -> tuple[list[findings.Finding], list[bool]]:
    """Return the findings; the judge's processes are started only for rows with truths."""
    if all(row.truth is None for row in rows):
        return findings.find(rows, tests, None)
    rule = score.Rule(judge=args.judge, accuracy_weight=1.0, format_weight=0.0)
    with workers.JudgePool(
        rule,
        num_workers=args.num_workers,
        deadline_seconds=_DEADLINE_SECONDS,
        memory_bytes=_MEMORY_BYTES,
    ) as judge:
        return findings.find(rows, tests, judge.grade)


def _shown(data: Sequence[survey.Part], facts: survey.Facts) -> page.Shown:
    row = data[facts.source].rows[facts.number]
    thumbnails = [
        images.thumbnail(image, side_pixels=_SIDE_PIXELS) for image in records.get_images(row)
    ]
    return page.Shown(
        id=row.id,
        question=records.shorten(records.get_question(row), _TEXT_CHARS),
        truth=facts.truth,
        responses={
            name: records.shorten(text, _TEXT_CHARS) for name, text in texts.responses(row).items()
        },
        pictures=tuple(
            examples.Picture(png=png, width=width, height=height)
            for png, width, height in thumbnails
        ),
    )


def _write(path: pathlib.Path, content: bytes) -> None:
    """Write a file as a whole or not at all."""
    try:
        small_files.replace(path, content)
    except OSError as error:
        raise errors.InputError(f"{path}: cannot be written: {error}") from error
