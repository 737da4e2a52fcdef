"""The one program: `python -m prism_jax COMMAND …`.

Exit codes, as the README has them too:

    0    done
    1    the job cannot go on: a full disk, a failed save, an update that is not finite too often;
         one line says what. A traceback means a bug
    2    the input is wrong: options, configuration, files, a checkpoint that is not the one that
         was written; one line names it, nothing was lost
    42   a process of the job did not come; one line says which
    130  interrupted from the keyboard
    143  stopped by SIGTERM; a training stage has saved its state
"""

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from prism_jax import errors

_INTERRUPTED = 130  # 128 + SIGINT

# Each command, the module whose `main(argv)` runs it, and what it does in one line. Only the module
# that runs is imported: all of them together take seconds.
COMMANDS = {
    "generate": ("commands.generate", "ask a model about images"),
    "convert": ("commands.convert", "Hugging Face folder to Flax and back"),
    "export": ("commands.export", "write a run's model for transformers"),
    "upcycle": ("commands.upcycle", "make a mixture of experts of a dense model"),
    "evaluate": ("commands.evaluate", "accuracy of a policy on a test split"),
    "pairs": ("commands.pairs", "responses beside a teacher's, for the discriminator"),
    "curate": ("commands.curate.main", "choose prompts by difficulty, have a teacher answer them"),
    "sft": ("stages.sft.main", "supervised fine-tuning on demonstrations"),
    "warmup": ("stages.warmup.main", "train the discriminator on pairs"),
    "align": ("stages.align.main", "train policy and discriminator against each other"),
    "rlvr": ("stages.rlvr.main", "reinforcement learning with verifiable rewards"),
    "data": ("commands.data", "write the embedded corpus, build data sets"),
    "pipeline": ("commands.pipeline.main", "the whole chain of stages on the embedded corpus"),
    "plan": ("commands.plan.main", "whether a configuration fits a machine that is not there"),
    "report": ("commands.report", "one page about a chain: plots, tables, responses"),
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
        module, _ = COMMANDS[argv[0]]
        importlib.import_module(f"prism_jax.{module}").main(argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of standard output has gone (`… | head`): nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    except Exception as error:
        known = _explained(error)
        if known is None:
            raise
        line, code = known
        sys.stderr.write(f"error: {line}\n")
        return code
    return 0


def _explained(error: Exception) -> tuple[str, int] | None:
    """Return one line about an error and the exit code; None for one that is a bug."""
    if isinstance(error, errors.InputError):
        # One line, whatever the message quotes.
        return _line(error), error.exit_code
    full = _full_disk(error)
    if full is not None:
        _silence_writers()
        return f"the disk is full, what was complete before stays: {full}", 1
    if isinstance(error, errors.KnownError):
        _silence_writers()
        return _line(error), error.exit_code
    # "Out of memory" or "Ran out of memory", by platform.
    is_device = "RESOURCE_EXHAUSTED" in str(error) and "ut of memory" in str(error)
    if isinstance(error, MemoryError) or is_device:
        message = (_line(error) or "the machine's is used up")[:300]
        return f"not enough memory; fewer or shorter rows need less: {message}", 1
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename!s}: {error.strerror or error}"
        if error.filename2 is not None:
            message = f"{error.filename!s} to {error.filename2!s}: {error.strerror or error}"
        return " ".join(message.split()), errors.InputError.exit_code
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _silence_writers() -> None:
    """Keep Orbax's other writes, which failed too, from telling it at exit, screens of it."""
    logging.getLogger("asyncio").disabled = True
    sys.unraisablehook = lambda _: None


def _full_disk(error: BaseException) -> str | None:
    """Return the message that says so, of an error or of what it came from; else None."""
    told = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    seen: BaseException | None = error
    while seen is not None:
        # TensorStore raises a ValueError with the system's words in it.
        if any(text in str(seen) for text in told):
            return _line(seen)
        seen = seen.__cause__ or seen.__context__
    return None
