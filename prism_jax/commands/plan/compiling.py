"""Compile the phases of a job in child processes, each with limits, and keep what they say."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from prism_jax import errors, progress
from prism_jax.commands.plan import opening

_ROOT = pathlib.Path(__file__).parents[3]
# What decides the programs: all of both packages.
_PACKAGES = ("models", "prism_jax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one compilation."""

    seconds: float
    gibibytes: float  # of the host's memory


def compile_phase(
    job: opening.Job, phase: str, *, cache: pathlib.Path, limits: Limits
) -> dict[str, Any]:
    """Return the bytes of a compiled phase, or `refusal`; from the cache where it has been done.

    Raises:
      InputError: it takes longer, or more memory, than the limits allow, or libtpu is missing.
    """
    given = {"job": dataclasses.asdict(job), "phase": phase}
    path = cache / f"{key(given)}.json"
    if path.exists():
        return json.loads(path.read_text())
    progress.say(f"compiling {job.stage}, {phase}, for {job.machine}")
    result = _run(given, limits)
    cache.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(result) + "\n")
    part.replace(path)
    return result


def key(given: dict[str, Any]) -> str:
    """Return the name of a result: of job and phase, the code, and the versions that compile it."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    text = json.dumps([given, code_digest(), versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def code_digest() -> str:
    """Return a digest of the project's code."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def require_libtpu() -> None:
    """Raise InputError where libtpu is not installed."""
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise errors.InputError(
            "plan compiles with libtpu, which is not installed: pip install 'prism-jax[tpu]', or "
            "--no-compile for arithmetic alone"
        ) from None


def _run(given: dict[str, Any], limits: Limits) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "PYTHONPATH": f"{_ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-m", "prism_jax.commands.plan.child"]
    child = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        begun = time.monotonic()
        sent: str | None = json.dumps(given)
        while True:
            try:
                out, err = child.communicate(sent, timeout=1)
                break
            except subprocess.TimeoutExpired:
                sent = None
                _check(child.pid, given, time.monotonic() - begun, limits)
    finally:
        child.kill()
        child.wait()
    if child.returncode:
        last = err.strip().rpartition("\n")[2]
        raise errors.InputError(f"compiling {given['phase']} failed: {last[:300]}")
    return json.loads(out.strip().rpartition("\n")[2])


def _check(pid: int, given: dict[str, Any], seconds: float, limits: Limits) -> None:
    """Raise InputError for a child that takes more than it may."""
    phase = given["phase"]
    if seconds > limits.seconds:
        raise errors.InputError(
            f"compiling {phase} takes more than {limits.seconds:g} s: give --compile-seconds"
        )
    held = _resident_gib(pid)
    if held > limits.gibibytes:
        raise errors.InputError(
            f"compiling {phase} takes more than {limits.gibibytes:g} GiB of this machine's memory: "
            "give --compile-gib"
        )


def _resident_gib(pid: int) -> float:
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(lines[0].split()[1]) / 2**20 if lines else 0.0
