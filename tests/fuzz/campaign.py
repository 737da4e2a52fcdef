"""The long profile: many inputs of every target, each in a process of its own.

    python -m tests.fuzz.campaign MINUTES [--seed N] [--only TARGET[,TARGET]] [--number N]

An input is a function of target, seed and number: `--only TARGET --seed N --number N` runs it
again, with its traceback. A finding is an exception other than a known error, a broken promise, an
input that takes more than a second of processor time or 400 MiB, memory that keeps growing, or a
process that dies. Findings of one place are listed once, with the smallest input. The exit code is
1 when there is a finding.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import logging
import mmap
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

for _name, _value in (
    ("JAX_PLATFORMS", "cpu"), ("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false"),
    ("TPU_SKIP_MDS_QUERY", "1"),
):  # fmt: skip
    os.environ.setdefault(_name, _value)

from tests.fuzz import target as target_lib  # noqa: E402
from tests.fuzz import targets  # noqa: E402

Json = Any

_ROOT = pathlib.Path(__file__).parents[2]
_LIMIT_SECONDS = 1.0
_LIMIT_MIB = 400.0
_LIMIT_GROWTH_MIB = 100.0
_ADDRESS_BYTES = 4 << 30  # beyond what the process has when the target is open
_WARM_INPUTS = 100  # what is loaded at first use is the fault of none
_SHRINK_SECONDS = 8.0
_STUCK_SECONDS = 90.0
_MOST_STARTS = 20
_INPUT_CHARS = 1500
_STATE = struct.Struct("qd")  # the number of the input that runs, and processor time so far


class TooSlowError(BaseException):
    """An input ran into the limit; not an Exception, so that nothing swallows it."""


@dataclasses.dataclass(kw_only=True)
class Finding:
    """What is wrong with an input: the kind, the place in the code, and the smallest such input."""

    number: int
    kind: str
    place: str
    shown: str

    @property
    def key(self) -> tuple[str, str]:
        """Return what findings of one cause have in common."""
        return self.kind, self.place


@dataclasses.dataclass(kw_only=True)
class Summary:
    """What became of the inputs of one target."""

    num_inputs: int = 0
    slowest_seconds: float = 0.0
    slowest_number: int = -1
    growth_mib: float = 0.0
    cpu_seconds: float = 0.0
    findings: list[Finding] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)


def generator(name: str, seed: int, number: int) -> random.Random:
    """Return what the input with a number is made of."""
    return random.Random(f"{name}/{seed}/{number}")


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    def stop(signum, frame):
        raise TooSlowError

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def attempt(target: target_lib.Target, given: Any) -> tuple[str, str] | None:
    """Return the kind and place of what is wrong with an input, None when nothing is."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    try:
        with _deadline(_LIMIT_SECONDS):
            target_lib.check(target, given)
    except KeyboardInterrupt:
        raise
    except TooSlowError as error:
        return None if target.is_slow_allowed else ("too slow", _place(error, "in Python"))
    except BaseException as error:
        return type(error).__name__, _place(error, str(error))
    seconds = time.process_time() - begun
    if seconds > _LIMIT_SECONDS and not target.is_slow_allowed:
        return "too slow", "in one native call"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return ("memory", f"more than {_LIMIT_MIB:.0f} MiB") if grown > _LIMIT_MIB else None


def _place(error: BaseException, message: str) -> str:
    """Return the project's innermost line, and a message without its numbers and quotes."""
    frames = traceback.extract_tb(error.__traceback__)
    inner = [frame for frame in frames if "/fuzz/" not in frame.filename]
    ours = [frame for frame in inner if pathlib.Path(frame.filename).is_relative_to(_ROOT)]
    ours = [frame for frame in ours if "/.venv/" not in frame.filename]
    frame = (ours or inner or list(frames))[-1]
    short = re.sub(r"\d+|'.*'|\".*\"", "…", message.strip().split("\n")[0])[:100]
    return f"{os.path.relpath(frame.filename, _ROOT)}:{frame.lineno} {frame.name}: {short}"


def shrink(target: target_lib.Target, given: Any, key: tuple[str, str]) -> Any:
    """Return a smaller input with the same thing wrong, by leaving out parts of its last part."""
    part = given[-1] if isinstance(given, list) and given else given
    if not isinstance(part, bytes | str | list) or key[0] == "too slow":
        return given  # each attempt would take as long again
    stop = time.monotonic() + _SHRINK_SECONDS
    size = max(1, len(part) // 2)
    while size and time.monotonic() < stop:
        at = 0
        while at < len(part) and time.monotonic() < stop:
            shorter = part[:at] + part[at + size :]
            smaller = target.rebuild(given, shorter)
            if attempt(target, smaller) == key:
                part = shorter
            else:
                at += size
        size //= 2
    return target.rebuild(given, part)


def _shown(given: Any) -> str:
    return f"{given!r}"[:_INPUT_CHARS]


def _resident_mib() -> float:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def work(name: str, folder: pathlib.Path, state: mmap.mmap, seed: int, seconds: float) -> None:
    """Run inputs from the number in `state` on, until the processor time is used up."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    target = targets.TARGETS[name](folder)
    used = int(re.search(r"VmSize:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_AS, ((used << 10) + _ADDRESS_BYTES,) * 2)
    for number in range(_WARM_INPUTS):
        with contextlib.suppress(BaseException), _deadline(_LIMIT_SECONDS):
            target.run(target.make(generator(name, -1, number)))
    summary = Summary()
    first, spent = _STATE.unpack_from(state)
    number, warm_mib, begun = first, _resident_mib(), time.process_time()
    while spent + time.process_time() - begun < seconds:
        _STATE.pack_into(state, 0, number, spent + time.process_time() - begun)
        given = target.make(generator(name, seed, number))
        start = time.process_time()
        key = attempt(target, given)
        took = time.process_time() - start
        if took > summary.slowest_seconds:
            summary.slowest_seconds, summary.slowest_number = took, number
        if key is not None and key not in {finding.key for finding in summary.findings}:
            finding = Finding(number=number, kind=key[0], place=key[1], shown=_shown(given))
            summary.findings.append(finding)
            # Written at once: a smaller input, or the next one, may end this process.
            _report(folder, summary, target, number - first)
            finding.shown = _shown(shrink(target, given, key))
            _report(folder, summary, target, number - first)
        number += 1
        if number % 500 == 0:
            _report(folder, summary, target, number - first)
    summary.growth_mib = _resident_mib() - warm_mib
    summary.cpu_seconds = time.process_time() - begun
    if summary.growth_mib > _LIMIT_GROWTH_MIB:
        grown = f"{summary.growth_mib:.0f} MiB over {number - first} inputs"
        summary.findings.append(Finding(number=-1, kind="memory", place=grown, shown=""))
    _report(folder, summary, target, number - first)


def _report(
    folder: pathlib.Path, summary: Summary, target: target_lib.Target, num_inputs: int
) -> None:
    summary.num_inputs = num_inputs
    summary.counts = dict(getattr(target, "counts", {}))
    partial = folder.with_suffix(".partial")
    partial.write_text(json.dumps(dataclasses.asdict(summary)))
    partial.replace(folder.with_suffix(".json"))


def supervise(name: str, base: pathlib.Path, seed: int, seconds: float) -> Summary:
    """Run a target in a child process; start another behind an input that ended it."""
    state = mmap.mmap(-1, _STATE.size)
    total = Summary()
    for start in range(_MOST_STARTS):
        first, _ = _STATE.unpack_from(state)
        folder = base / f"{name}{start}"
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            _child(lambda folder=folder: work(name, folder, state, seed, seconds), folder)
        status = _wait(pid, state)
        path = folder.with_suffix(".json")
        part = json.loads(path.read_text()) if path.exists() else dataclasses.asdict(Summary())
        if status != 0:
            part["num_inputs"] = _STATE.unpack_from(state)[0] - first
        _add(total, part)
        shutil.rmtree(folder, ignore_errors=True)
        if status == 0:
            break
        problem = folder.with_suffix(".txt")
        number, spent = _STATE.unpack_from(state)
        how = problem.read_text() if problem.exists() else _how(status)
        found = Finding(number=number, kind="dead process", place=how, shown=f"--number {number}")
        if found.key not in {finding.key for finding in total.findings}:
            total.findings.append(found)
        if problem.exists():
            break
        _STATE.pack_into(state, 0, number + 1, spent)
    return total


def _child(function: Callable[[], None], folder: pathlib.Path) -> None:
    """Run a function in this process and end it."""
    code = 9
    try:
        function()
        code = 0
    except BaseException:
        folder.with_suffix(".txt").write_text(traceback.format_exc()[-800:])
    finally:
        os._exit(code)


def _wait(pid: int, state: mmap.mmap) -> int:
    """Return a child's status; one whose input does not change for long is killed."""
    last, changed = -1, time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.2)
        number, _ = _STATE.unpack_from(state)
        if number != last:
            last, changed = number, time.monotonic()
        elif time.monotonic() - changed > _STUCK_SECONDS:
            os.kill(pid, signal.SIGKILL)


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit code {os.WEXITSTATUS(status)}"


def _add(total: Summary, part: Json) -> None:
    total.num_inputs += part["num_inputs"]
    total.cpu_seconds += part["cpu_seconds"]
    total.growth_mib = max(total.growth_mib, part["growth_mib"])
    if part["slowest_seconds"] > total.slowest_seconds:
        total.slowest_seconds = part["slowest_seconds"]
        total.slowest_number = part["slowest_number"]
    known = {finding.key for finding in total.findings}
    findings = [Finding(**fields) for fields in part["findings"]]
    total.findings += [finding for finding in findings if finding.key not in known]
    total.counts = dict(collections.Counter(total.counts) + collections.Counter(part["counts"]))


def replay(name: str, seed: int, number: int) -> int:
    """Run one input in this process, so that what it raises is seen."""
    with tempfile.TemporaryDirectory(prefix="fuzz_") as base:
        # One level down, as in a campaign: a command may write to `..`.
        folder = pathlib.Path(base) / name
        folder.mkdir()
        target = targets.TARGETS[name](folder)
        given = target.make(generator(name, seed, number))
        print(f"{given!r}"[:4000])
        target_lib.check(target, given)
    print(f"fuzz: input {number} of {name} with seed {seed} is read or refused as it should be")
    return 0


def main(argv: Sequence[str]) -> int:
    """Run the targets one after another; return the exit code."""
    parser = argparse.ArgumentParser(prog="fuzz.sh", description="Fuzz everything that is read.")
    parser.add_argument("minutes", type=float, help="of processor time, all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(targets.TARGETS), help="names, by commas")
    parser.add_argument("--number", type=int, help="run this one input of one target again")
    options = parser.parse_args(argv)
    names = options.only.split(",")
    unknown = sorted(set(names) - targets.TARGETS.keys())
    if unknown or options.minutes <= 0:
        known = ", ".join(targets.TARGETS)
        parser.error(f"MINUTES must be above 0 and --only name some of {known}")
    if options.number is not None:
        return replay(names[0], options.seed, options.number)
    weights = {name: targets.TARGETS[name].weight for name in names}
    share = options.minutes * 60 / sum(weights.values())
    num_inputs, num_findings = 0, 0
    with tempfile.TemporaryDirectory(prefix="fuzz_") as base:
        for name in names:
            found = supervise(name, pathlib.Path(base), options.seed, share * weights[name])
            num_inputs += found.num_inputs
            num_findings += len(found.findings)
            print(_line(name, found), flush=True)
            for finding in found.findings:
                print(f"  #{finding.number} {finding.kind} at {finding.place}")
                print(f"    {finding.shown}", flush=True)
    print(f"fuzz: {num_inputs} inputs with seed {options.seed}, {num_findings} findings")
    return 1 if num_findings else 0


def _line(name: str, found: Summary) -> str:
    counts = "".join(f", {key} {count}" for key, count in sorted(found.counts.items()))
    return (
        f"{name:14} {found.num_inputs:8} inputs, {len(found.findings)} findings, slowest "
        f"{found.slowest_seconds:.2f} s (#{found.slowest_number}), memory "
        f"{found.growth_mib:+.0f} MiB{counts}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
