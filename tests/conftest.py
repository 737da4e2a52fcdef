"""Set the platform before JAX starts and check the array shapes that public functions declare."""

import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Eight devices to shard over. Programs here are small and run once: compiling them is what takes
# time, so they are compiled without the costly optimisations.
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
_given = os.environ.get("XLA_FLAGS", "")
_added = [flag for flag in _FLAGS if flag.split("=")[0] not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()

import jax
import pytest
from absl import flags
from jaxtyping import install_import_hook

# Grain reads absl flags in its worker processes.
flags.FLAGS.mark_as_parsed()

install_import_hook(["models", "prism_jax.losses", "prism_jax.rollout"], "beartype.beartype")

# A compiled program takes dozens of memory mappings, of which Linux gives a process 65 530
# (vm.max_map_count); beyond them XLA's compiler dies of a segmentation fault.
_MOST_MAPPINGS = 16_000
_MAPPINGS = pathlib.Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Forget compiled programs after a file of tests when they have become many."""
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
