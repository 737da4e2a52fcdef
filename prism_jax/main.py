"""The one program: `python -m prism_jax COMMAND …`.

Exit codes, as the README has them too:

    0    done
    1    the job cannot go on: a full disk, a failed save, an update that is not finite too often;
         one line says what. A traceback means a bug
    2    the input is wrong: options, configuration, files, a checkpoint that is not the one that
         was written; one line names it, nothing was lost
    42   a process of the job did not come; one line says which
    130  interrupted from the keyboard
    134  another process of the job was lost; started again, the job goes on
    143  stopped by SIGTERM; a training stage has saved its state, a server has answered
"""

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from prism_jax import errors

_INTERRUPTED = 130  # 128 + SIGINT
_LINE_CHARS = 4000

# Each command: the module whose `main(argv)` runs it, and a summary in one line. Only that module
# is imported, since all of them together take seconds.
COMMANDS = {
    "generate": ("commands.generate", "ask a model about images"),
    "serve": ("commands.serve.main", "answer clients of OpenAI's API, score with a discriminator"),
    "convert": ("commands.convert", "Hugging Face folder to Flax and back"),
    "export": ("commands.export", "write a run's model for transformers"),
    "upcycle": ("commands.upcycle", "make a mixture of experts from a dense model"),
    "evaluate": ("commands.evaluate", "accuracy of a policy on a test split"),
    "pairs": ("commands.pairs", "responses beside a teacher's, for the discriminator"),
    "curate": ("commands.curate.main", "choose prompts by difficulty, have a teacher answer them"),
    "sft": ("stages.sft.main", "supervised fine-tuning on demonstrations"),
    "warmup": ("stages.warmup.main", "train the discriminator on pairs"),
    "align": ("stages.align.main", "train policy and discriminator against each other"),
    "rlvr": ("stages.rlvr.main", "reinforcement learning with verifiable rewards"),
    "data": ("commands.data", "write the embedded corpus, build data sets"),
    "audit": ("commands.audit.main", "what is in a data set, and what is wrong with it"),
    "pipeline": ("commands.pipeline.main", "run the whole chain of stages on the embedded corpus"),
    "plan": ("commands.plan.main", "tell whether a configuration fits a machine, without it"),
    "report": ("commands.report", "one page about a chain: plots, tables, responses"),
}


def usage() -> str:
    """Return the text of `--help`."""
    lines = [f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items()]
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
    empty = next((argument for argument in argv if argument.rpartition("=")[2] == "--"), None)
    if empty is not None:
        # argparse turns it into an empty list in the place of a text.
        sys.stderr.write(f"error: {argv[0]}: {empty} is no argument of a command\n")
        return errors.InputError.exit_code
    try:
        module, _ = COMMANDS[argv[0]]
        arguments = list(argv[1:])
        if any("hf://" in argument for argument in arguments):
            arguments = importlib.import_module("prism_jax.hub").resolved(arguments)
        importlib.import_module(f"prism_jax.{module}").main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of standard output has closed it (`… | head`): stop quietly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    except Exception as error:
        known = _explained(error)
        for end in errors.end_of_job:
            end(error, *(known or (None, 1)))
        if known is None:
            raise
        line, code = known
        sys.stderr.write(f"error: {line}\n")
        return code
    return 0


def _explained(error: Exception) -> tuple[str, int] | None:
    """Return one line about an error and the exit code; None for a bug."""
    if isinstance(error, errors.InputError):
        # On one line, whatever text the message quotes.
        return _line(error), error.exit_code
    full = _full_disk(error)
    if full is not None:
        _silence_writers()
        return f"the disk is full, everything complete before stays: {full}", 1
    if isinstance(error, errors.KnownError):
        _silence_writers()
        return _line(error), error.exit_code
    # "Out of memory" or "Ran out of memory", by platform.
    is_device = "RESOURCE_EXHAUSTED" in str(error) and "ut of memory" in str(error)
    if isinstance(error, MemoryError) or is_device:
        message = (_line(error) or "the machine's is used up")[:300]
        return f"not enough memory; fewer or shorter rows need less: {message}", 1
    if _is_foreign_address(error):
        line = f"a path must be local or begin with gs://, got another address: {_line(error)}"
        return line, errors.InputError.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename!s}: {error.strerror or error}"
        if error.filename2 is not None:
            message = f"{error.filename!s} to {error.filename2!s}: {error.strerror or error}"
        return " ".join(message.split()), errors.InputError.exit_code
    return None


def _line(error: BaseException) -> str:
    line = " ".join(str(error).split())
    if len(line) <= _LINE_CHARS:
        return line
    # A quotation may be as long as the user's file; both ends say more than the middle.
    return f"{line[: _LINE_CHARS // 2]} … {line[-_LINE_CHARS // 2 :]}"


def _is_foreign_address(error: Exception) -> bool:
    """Return whether epath was given an address of a kind that it cannot open."""
    if isinstance(error, KeyError):
        return len(error.args) == 1 and str(error.args[0]).endswith("://")
    return isinstance(error, ImportError) and "s3fs" in str(error)


def _silence_writers() -> None:
    """Silence the other failed writes of Orbax, which would print screens of errors at exit."""
    logging.getLogger("asyncio").disabled = True
    sys.unraisablehook = lambda _: None


def _full_disk(error: BaseException) -> str | None:
    """Return the message about a full disk, from an error or its causes; else None."""
    messages = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    cause: BaseException | None = error
    while cause is not None:
        # TensorStore raises a ValueError that quotes the system's message.
        if any(text in str(cause) for text in messages):
            return _line(cause)
        cause = cause.__cause__ or cause.__context__
    return None
