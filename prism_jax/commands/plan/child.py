"""Compile one phase of a job in a separate process: `python -m prism_jax.commands.plan.child`.

The job comes as JSON on standard input, the bytes of the compiled program go to standard output. A
program that the compiler refuses for its memory is a result.
"""

import json
import sys
import time
from typing import Any

import jax

from prism_jax.commands.plan import opening


def measure(job: opening.Job, phase: str) -> dict[str, Any]:
    """Return the compiler's figures for the memory of a phase's program."""
    jax.config.update("jax_platforms", "cpu")
    opened = opening.open_job(job, is_compiled=True)
    (program,) = (one for one in opened.programs if one.phase == phase)
    with jax.set_mesh(program.devices.mesh):
        lowered = program.lower()
        begun = time.monotonic()
        try:
            stats = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {"refusal": " ".join(str(error).split())[:300]}
    return {
        "argument": stats.argument_size_in_bytes,
        "output": stats.output_size_in_bytes,
        "alias": stats.alias_size_in_bytes,
        "temporary": stats.temp_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
        "compile_seconds": round(time.monotonic() - begun, 1),
    }


if __name__ == "__main__":
    given = json.load(sys.stdin)
    print(json.dumps(measure(opening.Job(**given["job"]), given["phase"])))
