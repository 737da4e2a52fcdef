"""Set the platform before JAX starts and check the array shapes that public functions declare."""

import os

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

from absl import flags
from jaxtyping import install_import_hook

# Grain reads absl flags in its worker processes.
flags.FLAGS.mark_as_parsed()

install_import_hook(["models", "prism_jax.losses", "prism_jax.rollout"], "beartype.beartype")
