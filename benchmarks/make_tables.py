"""Write docs/performance.md from the records in benchmarks/results.

python -m benchmarks.make_tables              (write it)
python -m benchmarks.make_tables --check      (exit 1 where it is not what the records say)
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import records

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_HEAD = """# Performance

Made from the records in `benchmarks/results` by `python -m benchmarks.make_tables`. Each ratio was
measured in one call on one machine; a peer ran in the same call. Where a target is missed, the
limit is named.

| record | claim | measured | target | met | where |
|---|---|---|---|---|---|
"""


def table(measured: Sequence[dict[str, Any]]) -> str:
    """Return the page."""
    rows, notes = [], []
    for one in measured:
        name = one.get("record", one["file"].removesuffix(".json"))
        where = f"{one.get('device', '?')}, {one.get('date', '?')}, [file](../benchmarks/results/"
        cells = [
            f"`{name}`",
            one["claim"],
            _cell(one["ratio"]),
            _cell(one["target"]),
            "yes" if one["is_met"] else "**no**",
            f"{where}{one['file']})",
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        notes.append(f"- `{name}`: {one.get('limit', '')} `{one.get('command', '')}`")
    return (
        _HEAD
        + "\n".join(rows)
        + "\n\n## Limits, and how to measure again\n\n"
        + ("\n".join(notes) + "\n")
    )


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{what}: {_cell(one)}" for what, one in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not measured"}[value]
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)


def main(arguments: list[str] | None = None) -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=_ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=pathlib.Path, default=_ROOT / "docs" / "performance.md")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    page = table(records.read(args.results))
    if not args.check:
        args.out.write_text(page)
    elif not args.out.exists() or args.out.read_text() != page:
        print(f"{args.out} is not what the records say", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
