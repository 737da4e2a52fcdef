"""JAX's table of keys and values among the processes of a job.

Only a job of several processes loads this module: it rests on `jax._src`, which is no part of JAX's
interface, and JAX offers the table nowhere else.
"""

from typing import Any

from jax._src import distributed


def client() -> Any:
    """Return this process's client of the table, once the processes have joined."""
    return distributed.global_state.client
