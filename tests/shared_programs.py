"""Compiled programs that the processes of a job on CPUs share: most of the time of such tests.

The program itself compiles on every process and at every start there; see `distributed.join`. Here
process 0 compiles, the others get what it made, and the next start reads it from disk.
"""

import jax
from jax._src import cache_key

from prism_jax.setup import distributed


def share() -> None:
    """Share programs among the processes of this job once it has joined them."""
    join = distributed.join

    def join_and_share(*args, **kwargs):
        join(*args, **kwargs)
        if jax.process_count() > 1:
            # The fingerprint of the devices is another one on each process.
            cache_key._hash_accelerator_config = cache_key._hash_devices
            jax.config.update("jax_share_binary_between_hosts", True)
            jax.config.update("jax_enable_compilation_cache", True)

    distributed.join = join_and_share
