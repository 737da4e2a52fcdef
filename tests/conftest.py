"""Set the platform before JAX starts and check the array shapes that public functions declare."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

from absl import flags
from jaxtyping import install_import_hook

# Grain reads absl flags in its worker processes.
flags.FLAGS.mark_as_parsed()

install_import_hook(["models", "prism_jax.losses", "prism_jax.rollout"], "beartype.beartype")
