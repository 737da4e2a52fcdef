"""Chip hours of runs, by what they went into: `python launch/chip_hours.py WORKDIR…`.

Reads `goodput.jsonl` of each folder, of every start of the run; a gs:// address through `gcloud`.
`--price` is dollars per chip and hour.
"""

import argparse
import collections
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Sequence

_FILE = "goodput.jsonl"
# Devices that JAX counts on one chip; one on every other kind.
_DEVICES_PER_CHIP = {"TPU7x": 2, "TPU v2": 2, "TPU v3": 2}


def of_lines(lines: Iterable[str]) -> dict[str, float]:
    """Return chip hours by part; a half-written last line is left out.

    Raises ValueError when the lines do not say how many devices there were.
    """
    starts: dict[str, dict] = {}
    for text in lines:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        starts[line["started"]] = line  # the last line of each start counts
    hours: collections.Counter[str] = collections.Counter()
    for line in starts.values():
        if "num_devices" not in line:
            raise ValueError("no num_devices: written by an older version")
        chips = line["num_devices"] / _DEVICES_PER_CHIP.get(line["device_kind"], 1)
        for name, value in line.items():
            if name.endswith("_seconds"):
                hours[name.removesuffix("_seconds")] += chips * value / 3600
    return dict(hours)


def _read(workdir: str) -> list[str]:
    path = f"{workdir.rstrip('/')}/{_FILE}"
    if not workdir.startswith("gs://"):
        return pathlib.Path(path).read_text().splitlines()
    command = ["gcloud", "storage", "cat", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(" ".join(done.stderr.split()))
    return done.stdout.splitlines()


def main(argv: Sequence[str]) -> int:
    """Print a line a run, and the sum."""
    parser = argparse.ArgumentParser(description="Chip hours of runs, from their goodput.jsonl.")
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--price", type=float, help="dollars per chip and hour")
    args = parser.parse_args(argv)
    whole = 0.0
    for workdir in args.workdirs:
        try:
            hours = of_lines(_read(workdir))
        except (OSError, ValueError) as error:
            sys.stderr.write(f"error: {workdir}/{_FILE}: {error}\n")
            return 2
        total = sum(hours.values())
        whole += total
        parts = ", ".join(f"{name} {value:.2f}" for name, value in sorted(hours.items()))
        print(f"{workdir}: {total:.2f} chip hours ({parts})")
    cost = "" if args.price is None else f", {whole * args.price:.2f} dollars"
    print(f"so far: {whole:.2f} chip hours{cost}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
