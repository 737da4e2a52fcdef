"""Records of measured claims: what is claimed, the ratio and its target, and where it was measured.

`benchmarks/make_tables.py` makes docs/performance.md of them.
"""

import datetime
import importlib.metadata
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

_PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "peft", "trl", "google-tunix")


def ratio(value: float | bool | None, target: str) -> dict[str, Any]:
    """Return a ratio, its target such as ">= 0.62", "<= 1.2" or "yes", and whether it is met."""
    if target == "yes":
        return {"value": value, "target": target, "is_met": value is True}
    sign, _, number = target.partition(" ")
    is_met = value is not None and (
        value >= float(number) if sign == ">=" else value <= float(number)
    )
    return {"value": value, "target": target, "is_met": is_met}


def make(
    name: str,
    claim: str,
    ratios: dict[str, dict[str, Any]],
    *,
    limit: str,
    raw: Any,
    module: str = "benchmarks.train",
    device: str | None = None,
) -> dict[str, Any]:
    """Return a record.

    Args:
      ratios: by what they are of, from `ratio`.
      limit: what limits a ratio that misses its target, or what the ratio is held against.
      raw: the measurements from which the ratios follow.
      module: the program that measured, with the arguments of this one.
      device: where it was measured; None: on the first device of this process.
    """
    return {
        "record": name,
        "claim": claim,
        "ratio": {what: one["value"] for what, one in ratios.items()},
        "target": {what: one["target"] for what, one in ratios.items()},
        "is_met": all(one["is_met"] for one in ratios.values()),
        "limit": limit,
        "device": jax.devices()[0].device_kind if device is None else device,
        "versions": versions(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "raw": raw,
    }


def emit(record: Mapping[str, Any], out: pathlib.Path | None) -> None:
    """Print a record, and write it to `out` unless that is None."""
    text = json.dumps(record, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are measured."""
    installed = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Return the records of a folder's JSON files, by name; other files are passed over."""
    records = []
    for path in sorted(folder.glob("*.json")):
        held = json.loads(path.read_text())
        candidates: Sequence[Any] = held if isinstance(held, list) else [held]
        records += [
            one | {"file": path.name}
            for one in candidates
            if isinstance(one, dict) and {"claim", "ratio", "target", "is_met"} <= one.keys()
        ]
    return sorted(records, key=lambda one: str(one.get("record", one["file"])))
