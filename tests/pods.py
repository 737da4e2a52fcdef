"""Jobs of several processes on this machine, by `launch/local_pod.sh`."""

import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

_ROOT = pathlib.Path(__file__).parents[1]
# As in `tests.conftest`: compiling is what takes the time.
QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def run(
    count: int,
    arguments: Sequence[str],
    *,
    cache: pathlib.Path,
    devices: int = 2,
    fault: str | None = None,
    shares_programs: bool = True,
    max_restarts: int = 0,
    timeout: float = 1200.0,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run a command in several processes, each with some devices; return how it ended.

    Args:
      cache: folder of compiled programs.
      fault: see `tests.faults`.
      shares_programs: see `tests.shared_programs`; False compiles on every process, as users do.
    """
    if fault is not None:
        environment["PRISM_TEST_FAULT"] = fault
    options = ["--devices", str(devices), "--max-restarts", str(max_restarts)]
    return subprocess.run(
        ["bash", "launch/local_pod.sh", str(count), *options, "--", *arguments],
        cwd=_ROOT,
        env={
            **programs(cache, shares_programs=shares_programs),
            "PRISM_GRACE_SECONDS": "60",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def programs(cache: pathlib.Path, *, shares_programs: bool) -> dict[str, str]:
    """Return the environment of the launchers, for programs that `cache` keeps.

    Args:
      shares_programs: as for `run`.
    """
    cache.mkdir(exist_ok=True)
    script = cache / "python"
    python = shlex.quote(sys.executable)
    # The launcher asks the interpreter for a free port, too.
    script.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {python} "$@"\nexec {python} -m tests.faults "$@"\n'
    )
    script.chmod(0o755)
    return {
        **os.environ,
        "PYTHONPATH": str(_ROOT),
        "PRISM_PYTHON": str(script),
        "PRISM_TEST_SHARES_PROGRAMS": str(int(shares_programs)),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def codes(done: subprocess.CompletedProcess) -> dict[int, int]:
    """Return the exit codes that are not 0, by process."""
    words = [line.split() for line in done.stderr.splitlines() if " ended with exit code " in line]
    return {int(line[1]): int(line[-1]) for line in words if line[0] == "process"}
