"""Judge tasks from standard input in a process that may be killed at any moment.

One JSON object a line in, a `score.Question`; one out, `{"reason": …}`. The first line out says
that the process is ready. `workers.py` starts it; nothing here imports JAX.

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
    """Serve until standard input ends."""
    deadline_seconds, memory_bytes = float(arguments[0]), int(arguments[1])
    # Libraries print; only the protocol may write to the pipe.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # The first comparison loads grammars: no task should pay for that with its deadline.
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
    except Exception:  # Whatever a policy can provoke in a parser: it costs the answer its reward.
        return score.Reason.ERROR


def _limit_processor_time(deadline_seconds: float) -> None:
    """Let the kernel end this process if its parent died and nobody keeps the deadline."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(time.process_time() + 2 * deadline_seconds + 1)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


if __name__ == "__main__":
    main(sys.argv[1:], symbolic.verify)
