"""Faults in jobs of several processes, tried one after the other; prints a table.

    python -m tests.fault_campaign FOLDER [--only=KIND] [--json=FILE] [--missing]

Each fault hits one process of a job of two (SFT at tiny size, gloo). The job must end by itself,
with the promised exit code on every process, and then go on in another number of processes to the
metrics and the parameters of a run that nothing disturbed. FOLDER keeps the compiled programs. FILE
gets each result as soon as it is known; with --missing faults that it has are not tried again.
`tests.campaign_page` makes the table of docs/pods.md of it.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests import pods
from tests.stages import sft_run

HEAD = "| fault | exit codes | seconds to end | went on | survived |\n|---|---|---:|---|---|"
_STEPS = (
    "--config.train.num_steps=6",
    *sft_run.ON_PROCESSES,
    "--config.mesh.num_devices=None",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One fault and the promised end."""

    name: str
    fault: str  # see `tests.faults`
    codes: dict[int, tuple[int, ...]]  # by process, those that may be seen
    then: int = 2  # processes that go on


def cases() -> list[Case]:
    """Return all faults that are tried."""
    lost, killed = (134, 1), (137,)
    faults = []
    for process in (0, 1):
        ends = {process: killed, 1 - process: lost}
        for step in (0, 3, 5):
            name = f"kill -9 of process {process} before step {step + 1}"
            faults.append(Case(name=name, fault=f"die_in_step:{process}:{step}", codes=ends))
        for step in (2, 4):
            name = f"kill -9 of process {process} while checkpoint {step} is written"
            case = Case(name=name, fault=f"die_in_save:{process}:{step}", codes=ends, then=4)
            faults.append(case)
        for step in (0, 2, 4):
            name = f"SIGTERM to process {process} before step {step + 1}"
            # Processes agree on a later place to stop at: the run may end before it is reached.
            both = dict.fromkeys((0, 1), (143, 0) if step == 4 else (143,))
            case = Case(name=name, fault=f"sigterm:{process}:{step}", codes=both, then=4)
            faults.append(case)
        failed = {0: (1,), 1: (1,)}
        name = f"disk full on process {process} at checkpoint 4"
        faults.append(Case(name=name, fault=f"full_disk:{process}:4", codes=failed))
        name = f"other rows on process {process} in step 4"
        faults.append(Case(name=name, fault=f"other_rows:{process}:3", codes=failed, then=1))
    return faults


def line(result: Mapping[str, Any]) -> str:
    """Return the line of a fault in the table."""
    codes = ", ".join(map(str, result["codes"]))
    survived = "yes" if result["survived"] else "**LOST**"
    return (
        f"| {result['fault']} | {codes} | {result['seconds']} | {result['then']} processes | "
        f"{survived} |"
    )


def counts(results: Sequence[Mapping[str, Any]]) -> str:
    """Return how many faults were tried, survived and lost."""
    survived = sum(one["survived"] for one in results)
    return f"{len(results)} tried, {survived} survived, {len(results) - survived} lost"


def _is_same(workdir: pathlib.Path, undisturbed: pathlib.Path) -> bool:
    rows, expected = sft_run.rows(workdir), sft_run.rows(undisturbed)
    if [row["step"] for row in rows] != [row["step"] for row in expected]:
        return False
    for row, wanted in zip(rows, expected, strict=True):
        pairs = [(row.get(name, math.nan), value) for name, value in wanted.items()]
        if not all(math.isclose(a, b, rel_tol=2e-4, abs_tol=2e-5) for a, b in pairs):
            return False
    saved, wanted = sft_run.saved(workdir), sft_run.saved(undisturbed)
    return all(np.allclose(saved[name], wanted[name], atol=5e-5) for name in wanted)


def main(argv: list[str]) -> int:
    """Try every fault; return 1 when one was not survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--only", default="", help="kind of fault, as `tests.faults` names it")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--missing", action="store_true", help="those that FILE does not have")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    files = options.folder / "files"
    if not files.exists():
        files.mkdir()
        sft_run.write(files, num_rows=8)
    cache = options.folder / "compiled"

    def run(workdir: pathlib.Path, count: int, fault: str | None = None):
        arguments = sft_run.arguments(files, workdir, *_STEPS)
        return pods.run(
            count,
            arguments,
            cache=cache,
            devices=4 // count,
            fault=fault,
            XLA_FLAGS=pods.QUICK_FLAGS,
        )

    undisturbed = options.folder / "undisturbed"
    if not (undisturbed / "finished.json").exists():
        run(undisturbed, 1).check_returncode()
    results: dict[str, dict] = {}
    if options.json is not None and options.json.exists():
        results = {one["fault"]: one for one in json.loads(options.json.read_text())}
    print(HEAD)
    for case in cases():
        if not case.fault.startswith(options.only):
            continue
        if options.missing and case.name in results:
            continue
        workdir = options.folder / case.fault.replace(":", "_")
        shutil.rmtree(workdir, ignore_errors=True)
        begun = time.monotonic()
        codes = pods.codes(run(workdir, 2, case.fault))
        seconds = time.monotonic() - begun
        is_as_promised = all(
            codes.get(process, 0) in wanted for process, wanted in case.codes.items()
        )
        is_done = run(workdir, case.then).returncode == 0
        results[case.name] = {
            "fault": case.name,
            "codes": [codes.get(process, 0) for process in (0, 1)],
            "seconds": round(seconds),
            "then": case.then,
            "survived": is_done and is_as_promised and _is_same(workdir, undisturbed),
        }
        print(line(results[case.name]), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(list(results.values()), indent=1) + "\n")
    print(f"\n{counts(list(results.values()))}")
    return int(not all(one["survived"] for one in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
