"""Judge questions from standard input in a process that may be killed at any moment.

Each input line is a `score.Question` as JSON, each output line `{"reason": …}`. The first output
line says that the process is ready. `workers.py` starts it; nothing here imports JAX.

    python -m prism_jax.rewards.judge_process DEADLINE_SECONDS MEMORY_BYTES
"""

import json
import math
import os
import resource
import sys
import time

from prism_jax.rewards import answer_official, score, symbolic


def main(arguments: list[str], mathematics: answer_official.Mathematics) -> None:
    """Answer questions until standard input ends."""
    deadline_seconds, memory_bytes = float(arguments[0]), int(arguments[1])
    # Libraries print; only the protocol may write to the pipe.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # The first comparison loads grammars, which should not count against a question's deadline.
    mathematics("expression", "x+1", "1+x")
    _reply(replies, {"ready": True})
    # Errors before this line are for the parent to report.
    os.dup2(null, 2)
    for line in sys.stdin:
        _limit_processor_time(deadline_seconds)
        _reply(replies, {"reason": _judge(json.loads(line), mathematics)})


def _reply(replies, message: dict) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _judge(fields: dict, mathematics: answer_official.Mathematics) -> str:
    fields["equivalent_answers"] = tuple(fields["equivalent_answers"])
    try:
        return score.judge(score.Question(**fields), mathematics)
    except Exception:  # A policy can provoke any error in a parser; the answer earns nothing.
        return score.Reason.ERROR


def _limit_processor_time(deadline_seconds: float) -> None:
    """Let the kernel end this process if the parent, which keeps the deadline, has died."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(time.process_time() + 2 * deadline_seconds + 1)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


if __name__ == "__main__":
    main(sys.argv[1:], symbolic.verify)
