"""Where the time of a compiled program goes, kernel by kernel, from a trace of the profiler."""

import collections
import json
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax

# A command buffer would hide the kernels that it holds.
NO_COMMAND_BUFFERS = {"xla_gpu_enable_command_buffer": ""}
# Kernel groups by a part of the name; the first that fits.
Groups = Sequence[tuple[str, str]]

_NO_KERNELS = ("while", "command_buffer", "end: ", "Threadpool")


def say(text: str) -> None:
    """Print a line about the progress."""
    print(text, file=sys.stderr, flush=True)


def report(result: Mapping) -> None:
    """Print a result in one line, so that an interrupted run keeps it."""
    say(json.dumps(result))


def trace(run: Callable[[], object]) -> tuple[float, list[tuple[str, float]]]:
    """Return the seconds that `run` took and its kernels in order, (name, microseconds)."""
    on_gpu = jax.default_backend() == "gpu"
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            begun = time.perf_counter()
            jax.block_until_ready(run())
            seconds = time.perf_counter() - begun
        [path] = pathlib.Path(folder).rglob("*.xplane.pb")
        read = jax.profiler.ProfileData.from_file(str(path))
        events = [
            (event.name, event.duration_ns / 1e3)
            for plane in read.planes
            for line in plane.lines
            if (("GPU" in plane.name and "Stream" in line.name) if on_gpu else "XLA" in line.name)
            for event in line.events
            if not event.name.startswith(_NO_KERNELS)
        ]
    return seconds, events


def group_of(kernel: str, groups: Groups) -> str:
    """Return the group that a kernel belongs to, by its name."""
    for group, pattern in groups:
        if re.search(pattern, kernel, re.IGNORECASE):
            return group
    return "other"


def sources(compiled: str) -> dict[str, str]:
    """Return the source of each instruction of a compiled program, by kernel name.

    Args:
      compiled: its `as_text()`, whose instructions name the operation that they come from.
    """
    pattern = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', re.MULTILINE)
    return {re.sub(r"[.-]", "_", name): source for name, source in pattern.findall(compiled)}


def summarize(
    events: Iterable[tuple[str, float]],
    num_steps: int,
    *,
    groups: Groups,
    num_kernels: int,
    origins: Mapping[str, str] | None = None,
) -> dict:
    """Add up kernels (name, microseconds) by group, and by name without its number.

    Args:
      num_kernels: how many are listed, those that took longest.
      origins: from `sources`; with it kernels keep their numbers and are told with their origin.
    """
    total, count, by_group = (collections.Counter() for _ in range(3))
    for name, microseconds in events:
        short = (name if origins is not None else re.sub(r"([._]\d+)+$", "", name))[:100]
        total[short] += microseconds
        count[short] += 1
        by_group[group_of(short, groups)] += microseconds
    kernels = [
        {"name": name, "total_microseconds": time, "count": count[name]}
        for name, time in total.most_common(num_kernels)
    ]
    if origins is not None:
        for kernel in kernels:
            kernel["origin"] = origins.get(re.sub(r"[.-]", "_", kernel["name"]), "")
    return {
        "steps": num_steps,
        "busy_microseconds_a_step": sum(total.values()) / num_steps,
        "kernels_a_step": sum(count.values()) / num_steps,
        "groups_microseconds_a_step": {k: v / num_steps for k, v in by_group.most_common()},
        "kernels": kernels,
    }
