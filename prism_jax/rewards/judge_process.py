"""Judge questions from standard input in a process that may be killed at any moment.

Each input line is a `score.Question` as JSON, each output line `{"reason": …}`. The first output
line says that the process is ready. `workers.py` starts it; nothing here imports JAX.

    python -m prism_jax.rewards.judge_process DEADLINE_SECONDS MEMORY_BYTES
"""

import os
import sys

from prism_jax.rewards import answer_official, protocol, score, symbolic


def main(arguments: list[str], mathematics: answer_official.Mathematics) -> None:
    """Answer questions until standard input ends."""
    deadline_seconds, memory_bytes = float(arguments[0]), int(arguments[1])
    # Libraries print; only the protocol may write to the pipe.
    null = os.open(os.devnull, os.O_WRONLY)
    requests, replies = protocol.open_pipes(prints_to=null)
    protocol.limit_memory(memory_bytes)
    # The first comparison loads grammars, which should not count against a question's deadline.
    mathematics("expression", "x+1", "1+x")
    protocol.reply(replies, {"ready": True})
    # Errors before this line are for the parent to report.
    os.dup2(null, 2)
    for fields in protocol.receive(requests, deadline_seconds=deadline_seconds, num_threads=1):
        protocol.reply(replies, {"reason": _judge(fields, mathematics)})


def _judge(fields: dict, mathematics: answer_official.Mathematics) -> str:
    fields["equivalent_answers"] = tuple(fields["equivalent_answers"])
    try:
        return score.judge(score.Question(**fields), mathematics)
    except Exception:  # A policy can provoke any error in a parser; the answer earns nothing.
        return score.Reason.ERROR


if __name__ == "__main__":
    main(sys.argv[1:], symbolic.verify)
