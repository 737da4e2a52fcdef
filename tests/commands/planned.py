"""Jobs of shipped configurations, for tests of `plan`."""

import importlib

from prism_jax import configuration
from prism_jax.commands.plan import jobs, opening, planning


def job(stage: str, size: str, machine: str, **changes) -> opening.Job:
    """Return the job of a shipped configuration with some fields changed."""
    config = importlib.import_module(f"configs.{stage}").get_config(size)
    config.update_from_flattened_dict(changes)
    plain = configuration.plain(config)
    return jobs.make(stage, plain, size=size.partition(",")[0], machine=machine, given=jobs.Given())


def estimate(stage: str, size: str, machine: str, **changes) -> planning.Plan:
    """Return the plan of such a job, nothing of it compiled."""
    return planning.make(job(stage, size, machine, **changes), None)
