"""How much of the pictures the policies of a chain read: marks of grids against the true captions.

    python -m benchmarks.captions_read --chain=runs/small --out=FILE.json

The chain is a finished `pipeline` on `numerals`. A caption whose rows do not have the lengths of
the true one's is counted as a wrong layout, and its marks are left out.
"""

import argparse
import collections
import itertools
import json
import pathlib
import re
from typing import Any

from prism_jax.data import parquet_tables

Json = Any
STAGES = ("sft", "align", "rlvr")


def rows_of(caption: str) -> list[list[str]]:
    """Return the marks of each row that a caption names, as "blue 7" or "K"."""
    rows = re.findall(r"Row \d+: ([^\n]*?)\.(?:\n|$)", caption)
    return [[mark.strip() for mark in row.split(",")] for row in rows]


def reading(truths: dict[str, str], responses: list[Json]) -> dict[str, Json]:
    """Compare captions with the true ones.

    Args:
      truths: true caption by the id of the prompt.
      responses: rows of an evaluation's `responses.jsonl`.

    Returns:
      Counts of grids and marks, and shares: right layouts, captions without an error, marks right
      in kind and colour, digits right by digit.
    """
    num_grids = num_laid = num_whole = num_marks = num_right = 0
    digits, right_digits = collections.Counter(), collections.Counter()
    for response in responses:
        true = rows_of(truths[response["id"]])
        if not true:
            continue
        caption_rows = rows_of(response["caption"])
        num_grids += 1
        if [len(row) for row in caption_rows] != [len(row) for row in true]:
            continue
        num_laid += 1
        num_whole += caption_rows == true
        marks = (itertools.chain(*rows) for rows in (true, caption_rows))
        for wanted, got in zip(*marks, strict=True):
            num_marks += 1
            num_right += got == wanted
            name = wanted.split()[-1]
            if name.isdigit():
                digits[name] += 1
                right_digits[name] += got.split()[-1:] == [name]
    return {
        "num_grids": num_grids,
        "num_marks": num_marks,
        "layout_right": round(num_laid / num_grids, 4),
        "caption_right": round(num_whole / num_grids, 4),
        "mark_right": round(num_right / num_marks, 4) if num_marks else None,
        "digit_right": {
            name: round(right_digits[name] / digits[name], 4) for name in sorted(digits)
        },
    }


def main() -> None:
    """Read the chain's files and write the shares of every stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chain", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    rows = parquet_tables.ParquetTable(str(args.chain / "corpus/rl/test.parquet")).scan()
    truths = {f"test.parquet:{number}": row["teacher_caption"] for number, row in rows}
    readings = {}
    for stage in STAGES:
        text = (args.chain / f"evaluate_{stage}/responses.jsonl").read_text(encoding="utf-8")
        responses = [json.loads(line) for line in text.splitlines()]
        greedy = [response for response in responses if response["draw"] == "greedy"]
        readings[stage] = reading(truths, greedy)
    command = "python -m benchmarks.captions_read --chain=RUN --out=FILE"
    record = {"command": command, "reading": readings}
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
