"""The one program: `python -m prism_jax COMMAND …`.

Exit codes: 0 done; 1 unexpected, or a full disk, which one line says; 2 the input is wrong, one
line says how; 42 a process of the job did not come; 143 preempted and saved.
"""

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from prism_jax import errors

# Each command, a module of `prism_jax.stages` with a `main(argv)`, and what it does in one line.
# Only the one that runs is imported: all of them together take seconds.
COMMANDS = {
    "generate": "ask a model about images",
    "convert": "Hugging Face folder to Flax and back",
    "export": "write a run's model for transformers",
    "upcycle": "make a mixture of experts of a dense model",
    "evaluate": "accuracy of a policy on a test split",
    "pairs": "responses beside a teacher's, for the discriminator",
    "curate": "choose prompts by difficulty, have a teacher answer them",
    "sft": "supervised fine-tuning on demonstrations",
    "warmup": "train the discriminator on pairs",
    "align": "train policy and discriminator against each other",
    "rlvr": "reinforcement learning with verifiable rewards",
    "data": "write the embedded corpus, build data sets",
    "pipeline": "the whole chain of stages on the embedded corpus",
    "report": "one page about a chain: plots, tables, responses",
}


def usage() -> str:
    """Return what `--help` prints."""
    lines = [f"  {name:10} {told}" for name, told in COMMANDS.items()]
    return "\n".join(["usage: python -m prism_jax COMMAND [--help] …", "", "commands:", *lines, ""])


def main(argv: Sequence[str]) -> int:
    """Run one command; return the exit code."""
    if argv and argv[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if not argv or argv[0] not in COMMANDS:
        given = f"unknown command {argv[0]!r}\n" if argv else ""
        sys.stderr.write(given + usage())
        return 2
    try:
        importlib.import_module(f"prism_jax.stages.{argv[0]}").main(argv[1:])
        sys.stdout.flush()
    except errors.InputError as error:
        # One line, whatever the message quotes.
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except BrokenPipeError:
        # The reader of standard output has gone (`… | head`): nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        full = _full_disk(error)
        if full is None:
            raise
        # Orbax's other writes, which failed too, would be told at exit, screens of them.
        logging.getLogger("asyncio").disabled = True
        sys.unraisablehook = lambda _: None
        sys.stderr.write(f"error: the disk is full, what was complete before stays: {full}\n")
        return 1
    return 0


def _full_disk(error: BaseException) -> str | None:
    """Return the message that says so, of an error or of what it came from; else None."""
    told = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    seen: BaseException | None = error
    while seen is not None:
        # TensorStore raises a ValueError with the system's words in it.
        if any(text in str(seen) for text in told):
            return " ".join(str(seen).split())
        seen = seen.__cause__ or seen.__context__
    return None
