"""Where compiled programs are kept between runs, unless the user says where.

JAX reads `JAX_COMPILATION_CACHE_DIR` when it is imported; this comes first and imports nothing of
it. `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off.
"""

import os
import pathlib
import zlib
from collections.abc import Mapping, MutableMapping

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_CPU = pathlib.Path("/proc/cpuinfo")


def set_default(environment: MutableMapping[str, str]) -> None:
    """Name a folder of the user's cache, where the environment names none."""
    folder = _folder(environment)
    if VARIABLE not in environment and folder is not None:
        environment[VARIABLE] = folder


def is_default(environment: Mapping[str, str]) -> bool:
    """Return whether programs are kept in the folder that `set_default` names."""
    return VARIABLE in environment and environment[VARIABLE] == _folder(environment)


def _folder(environment: Mapping[str, str]) -> str | None:
    """Return the folder in the user's cache; None: a user without a home has none.

    Each kind of CPU has its own, since machines may share a home: a program compiled for the
    instructions of one can crash another.
    """
    base = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        return None
    return os.path.join(base, "prism_jax", f"compiled_{_instructions()}")


def _instructions() -> str:
    """Return a digest of the instructions that this machine's CPU has."""
    lines = _CPU.read_text().splitlines() if _CPU.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{zlib.crc32(flags.encode()):08x}"
