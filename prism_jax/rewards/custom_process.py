"""Call a reward function of the user's, sample by sample, in a process that may be killed.

Each input line is a sample as JSON, each output line `{"reason": "scored", "parts": {…}}` or
`{"reason": "error", "detail": …}`. What the function prints goes to standard error. `custom.py`
starts this program and has the contract.

    python -m prism_jax.rewards.custom_process FILE FUNCTION DEADLINE_SECONDS MEMORY_BYTES
"""

import numbers
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from prism_jax import user_functions
from prism_jax.rewards import protocol

Json = Any


def main(arguments: list[str]) -> None:
    """Answer samples until standard input ends."""
    path, name, deadline_seconds, memory_bytes = arguments
    requests, replies = protocol.open_pipes(prints_to=2)
    protocol.limit_memory(int(memory_bytes))
    try:
        function = user_functions.load(path, name)
    except BaseException as error:  # a file may also exit
        where = user_functions.describe(error, path)
        protocol.reply(replies, {"failed": f"{path}:{name} cannot be loaded: {where}"})
        return
    protocol.reply(replies, {"ready": True})
    for sample in protocol.receive(
        requests, deadline_seconds=float(deadline_seconds), num_threads=os.cpu_count() or 1
    ):
        protocol.reply(replies, _answer(function, sample, path))


def _answer(function: Callable[[dict], Any], sample: dict[str, Json], path: str) -> dict[str, Json]:
    try:
        value = function(sample)
    except Exception as error:
        return {"reason": "error", "detail": user_functions.describe(error, path)}
    parts = dict(value) if isinstance(value, Mapping) else {"total": value}
    problem = contract_problem(parts)
    if problem is not None:
        return {"reason": "error", "detail": problem}
    return {"reason": "scored", "parts": {name: float(part) for name, part in parts.items()}}


def contract_problem(parts: Mapping[Any, Any]) -> str | None:
    """Return the part of the contract that a returned value breaks, None if it keeps it."""
    if "total" not in parts:
        return f"returned a dict without 'total', with {', '.join(map(repr, parts)) or 'nothing'}"
    for name, part in parts.items():
        if not isinstance(name, str) or not name.isidentifier():
            return f"returned a part with the name {name!r}; a name must be letters, digits and _"
        if not isinstance(part, numbers.Real):
            return f"returned {part!r:.100} for {name}; it must be a number"
        # NaN is in no interval.
        if not 0 <= part <= 1:
            return f"returned {part!r} for {name}; it must be in [0, 1]"
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
