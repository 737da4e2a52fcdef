"""Whether a configuration fits a machine that is not there, and how fast a step could be there.

    python -m prism_jax plan --config=configs/rlvr.py:8b --topology=v5p:2x4x4
    python -m prism_jax plan --config=configs/sft.py:4b --gpus=4 --hbm=80

For a TPU the programs of the stage are compiled at its shapes, by libtpu on this machine, which
needs no TPU: minutes and some GiB of memory for each the first time, kept in --cache afterwards.
For GPUs, and with --no-compile, all is an estimate from shapes. When something does not fit, the
fields are named that would make it fit. Fields are overridden as in the stage itself
(--config.train.num_rows=8). Models and passes that options add are counted: a reference, an open
teacher (--config.distill.folder=8b), an adversary, the mean of a discriminator's weights, its
penalty, replayed prompts and swapped pictures. Exit code 0: it fits in 0.90 of the memory, and the
sampler in the rest; 1: it does not.

--table makes docs/fits.md, see `commands.plan.table`.
"""

import argparse
import os
import pathlib
import re
from collections.abc import Sequence

import jax

from prism_jax import configuration, errors
from prism_jax.commands.plan import compiling, jobs, opening, page, planning, table

_CACHE = "~/.cache/prism_jax/plan"


class NotFitting(errors.KnownError):
    """The configuration does not fit the machine."""


def main(argv: Sequence[str]) -> None:
    """Print the plan; raise `NotFitting` when it does not fit."""
    jax.config.update("jax_platforms", "cpu")
    args, rest = _parser().parse_known_args(argv)
    limits = compiling.Limits(seconds=args.compile_seconds, gibibytes=args.compile_gib)
    compile_phase = None
    if not args.no_compile and args.gpus is None:
        compile_phase = planning.compiler(pathlib.Path(args.cache).expanduser(), limits)
    if args.table is not None:
        table.write(pathlib.Path(args.table), compile_phase, only=args.only)
        return
    job = _job(args, rest)
    plan = planning.make(job, compile_phase)
    print("\n".join(page.lines(plan)), flush=True)
    if plan.fits:
        return
    advice = planning.advise(plan, compile_phase)
    if advice is None:
        raise NotFitting(
            f"{job.stage} does not fit {plan.opened.machine.name}, whatever was tried: more chips"
        )
    print("\n".join(page.advice(*advice)), flush=True)
    raise NotFitting(f"{job.stage} as configured does not fit {plan.opened.machine.name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m prism_jax plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="configs/STAGE.py:SIZE,OPTION,…")
    machine = parser.add_mutually_exclusive_group()
    machine.add_argument("--topology", help="v5e:4x4, v5p:2x4x4, v6e:2x4, tpu7x:2x2x1, …")
    machine.add_argument("--gpus", type=int, help="number of GPUs of one host")
    machine.add_argument("--table", metavar="FILE", help="write the table of all configurations")
    parser.add_argument("--only", metavar="NAME", help="of --table, STAGE/SIZE/TOPOLOGY alone")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices of that topology")
    parser.add_argument("--hbm", type=float, default=80.0, help="GB of a GPU")
    parser.add_argument("--model", help="2b, 4b, 8b, 32b, 30b_a3b or a folder with config.json")
    parser.add_argument("--discriminator", help="discriminator, or a folder with config.json")
    parser.add_argument("--teacher", help="that of config.distill, as for --model")
    parser.add_argument("--prompt_tokens", type=int, help="of the longest prompt")
    parser.add_argument("--prompt_patches", type=int, help="of its pictures")
    parser.add_argument("--prompt_images", type=int, default=1)
    parser.add_argument("--teacher_tokens", type=int, default=6144, help="of a longest segment")
    parser.add_argument("--no-compile", action="store_true", help="estimate from shapes alone")
    parser.add_argument("--cache", default=os.environ.get("PRISM_PLAN_CACHE", _CACHE))
    parser.add_argument("--compile-seconds", type=float, default=3600.0, help="limit of a program")
    parser.add_argument("--compile-gib", type=float, default=16.0, help="of this machine's memory")
    return parser


def _job(args: argparse.Namespace, rest: Sequence[str]) -> opening.Job:
    """Return the job that the arguments name.

    Raises:
      InputError: an argument is missing or wrong.
    """
    if not args.config or (args.topology is None and args.gpus is None):
        raise errors.InputError("plan: --config=… and --topology=… (or --gpus=N) must be given")
    stage = opening.stage_of(args.config)
    config, _ = configuration.read(
        [f"--config={args.config}", *rest, "--workdir=none"], command="plan"
    )
    size = re.sub(r"[,_].*", "", args.config.partition(":")[2]) or "4b"
    return jobs.make(
        stage,
        configuration.plain(config),
        size=size,
        machine=args.topology if args.gpus is None else str(args.gpus),
        num_slices=args.slices,
        hbm_gigabytes=None if args.gpus is None else args.hbm,
        given=jobs.Given(
            model=args.model,
            discriminator=args.discriminator,
            teacher=args.teacher,
            prompt_tokens=args.prompt_tokens,
            prompt_patches=args.prompt_patches,
            prompt_images=args.prompt_images,
            teacher_tokens=args.teacher_tokens,
        ),
    )
