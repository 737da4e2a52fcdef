"""The one program: `python -m prism_jax COMMAND …`.

Exit codes: 0 done; 1 unexpected; 2 the input is wrong, one line says how; 143 preempted and saved.
"""

import os
import sys
from collections.abc import Callable, Sequence

from prism_jax import errors
from prism_jax.stages import convert, data, evaluate, export, generate, pairs, sft, upcycle

# Each command with what it does in one line.
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "generate": (generate.main, "ask a model about images"),
    "convert": (convert.main, "Hugging Face folder to Flax and back"),
    "export": (export.main, "write a run's model for transformers"),
    "upcycle": (upcycle.main, "make a mixture of experts of a dense model"),
    "evaluate": (evaluate.main, "accuracy of a policy on a test split"),
    "pairs": (pairs.main, "responses beside a teacher's, for the discriminator"),
    "sft": (sft.main, "supervised fine-tuning on demonstrations"),
    "data": (data.main, "write the embedded corpus, build data sets"),
}


def usage() -> str:
    """Return what `--help` prints."""
    lines = [f"  {name:10} {told}" for name, (_, told) in COMMANDS.items()]
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
        COMMANDS[argv[0]][0](argv[1:])
        sys.stdout.flush()
    except errors.InputError as error:
        # One line, whatever the message quotes.
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except BrokenPipeError:
        # The reader of standard output has gone (`… | head`): nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
