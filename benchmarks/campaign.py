"""The campaign of docs/science.md: SFT, alignment and RLVR in all combinations, over seeds.

    python -m benchmarks.campaign FOLDER [--size=demo] [--seeds=0,1,2,3,4] [--policies=core]
        [--minutes=7] [--record=FILE.json] [--config.… overrides of configs/pipeline.py]

Each seed has a folder, FOLDER/seedN, in the form of a `pipeline`; a step is a stage of one policy.
Finished steps are never run again, an interrupted one resumes: after a kill, or after `--minutes`,
start the same command again. Steps that several policies share run once. Seeds are the outer loop;
several processes may work on different seeds of one FOLDER. The compiled programs are shared.

A base model is read from `--base`, launch/demo_base for demo; for small one is trained in
FOLDER/base. At the end of each call FOLDER/record.json holds what has been measured so far;
`benchmarks.campaign_page` makes the tables of it. Run it from the folder that holds `configs/`.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from benchmarks import campaign_policies, campaign_record
from prism_jax import configuration, errors, small_files
from prism_jax.checkpoints import lock
from prism_jax.commands.pipeline import run as pipeline_run
from prism_jax.commands.pipeline import steps as pipeline_steps
from prism_jax.data.numerals import examples as numerals_examples
from prism_jax.report import results

_PROGRAM = (sys.executable, "-m", "prism_jax")
_BEAT_SECONDS = 15.0
_BASES = {"tiny": "", "demo": "launch/demo_base", "small": ""}
_NEW_BASE = f"{pipeline_steps.WORKDIR}/../base/base_model"
# As in launch/demo.sh: XLA takes and returns the same large buffers in every step.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "MALLOC_TOP_PAD_": "536870912",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}


def chain(
    size: str, seed: int, base: Mapping[str, str], overrides: Sequence[str]
) -> pipeline_steps.Config:
    """Return the configuration of a seed's chain."""
    fields = (f"--config.base.{name}={value}" for name, value in base.items())
    arguments = [f"--config=configs/pipeline.py:{size},drift", "--workdir=unused"]
    arguments += [f"--config.seed={seed}", *fields, *overrides]
    config, _ = configuration.read(arguments, command="pipeline")
    return configuration.parse(pipeline_steps.Config, config)


def base_steps(size: str, overrides: Sequence[str]) -> list[pipeline_steps.Step]:
    """Return the steps that train a new base model, the same for all seeds."""
    tokenizer = f"{pipeline_steps.WORKDIR}/tokenizer"
    config = chain(size, 0, {"folder": "", "tokenizer": tokenizer}, overrides)
    rows = [row for row in config.corpus.rows if row.startswith("base=")]
    others = [part for part in numerals_examples.STREAMS if part != "base"]
    config = _with_rows(config, (*rows, *(f"{part}=0" for part in others)))
    made = pipeline_steps.Step(
        name="tokenizer",
        arguments=("data", "tokenizer", f"--level={config.corpus.level}", f"--out={tokenizer}"),
        removed="tokenizer",
    )
    steps = pipeline_steps.plan(config)
    return [made, *steps[: [step.name for step in steps].index("base_model") + 1]]


def seed_chain(size: str, seed: int, base: str, overrides: Sequence[str]) -> pipeline_steps.Config:
    """Return the chain of a seed, which starts from the campaign's base model."""
    config = chain(size, seed, {"folder": base, "tokenizer": ""}, overrides)
    rows = (row for row in config.corpus.rows if not row.startswith("base="))
    return _with_rows(config, tuple(rows))


def _with_rows(config: pipeline_steps.Config, rows: tuple[str, ...]) -> pipeline_steps.Config:
    return dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, rows=rows))


@contextlib.contextmanager
def _until(deadline: float | None) -> Iterator[None]:
    """Have the running step saved and ended at a time of `time.monotonic`; None: never."""
    if deadline is None:
        yield
        return
    seconds = max(0.0, deadline - time.monotonic())
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run(
    folder: pathlib.Path,
    steps: Sequence[pipeline_steps.Step],
    *,
    deadline: float | None,
    program: Sequence[str] = _PROGRAM,
) -> bool:
    """Run the steps of one seed that have not finished; return False where time ran out.

    Raises:
      SystemExit: a step failed, or somebody else stopped it.
    """
    with lock.hold(str(folder), beat_seconds=_BEAT_SECONDS):
        runner = pipeline_run.Runner(
            folder, program=program, num_steps=len(steps), stream=sys.stderr
        )
        try:
            with _until(deadline):
                runner.run(steps)
        except SystemExit as stop:
            is_late = deadline is not None and time.monotonic() >= deadline
            if stop.code == pipeline_run.STOPPED and is_late:
                return False
            raise
    return True


def _are_finished(folder: pathlib.Path, steps: Sequence[pipeline_steps.Step]) -> bool:
    """Return whether all steps have finished in a folder."""
    found = [
        small_files.read(folder / results.STEPS_FOLDER / f"{step.name}.json", results.STEP)
        for step in steps
    ]
    return all(step is not None and step["is_finished"] for step in found)


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=pathlib.Path)
    options.add_argument("--size", default="demo", choices=tuple(_BASES))
    options.add_argument("--seeds", default="0,1,2,3,4")
    options.add_argument(
        "--policies",
        default=",".join(campaign_policies.GROUPS),
        help="names, or groups: " + ", ".join(campaign_policies.GROUPS),
    )
    options.add_argument("--minutes", type=float, help="after which to save and end")
    options.add_argument("--base", help="Hugging Face folder of the base model")
    options.add_argument("--record", type=pathlib.Path, help="a copy of FOLDER/record.json")
    options.add_argument("--title", default="", help="of the record: where it was measured")
    options.add_argument(
        "--measure-only", action="store_true", help="run nothing, write the record"
    )
    return options


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise errors.InputError(f"--seeds={text}: must be whole numbers and commas") from error


def main(argv: Sequence[str], *, program: Sequence[str] = _PROGRAM) -> int:
    """Run what the time allows; return 0, also where steps are left for the next call."""
    args, overrides = parser().parse_known_args(argv)
    foreign = [text for text in overrides if not text.startswith("--config.")]
    if foreign:
        raise errors.InputError(f"campaign: unknown arguments {' '.join(foreign)}")
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    base = args.base or _BASES[args.size]
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((args.folder / "compiled").resolve()))
    plans = {}
    for seed in _seeds(args.seeds):
        config = seed_chain(args.size, seed, base or _NEW_BASE, overrides)
        policies = campaign_policies.Campaign(config).policies()
        try:
            chosen = campaign_policies.chosen(policies, args.policies.split(","))
        except ValueError as error:
            raise errors.InputError(f"--policies={args.policies}: {error}") from error
        plans[args.folder / f"seed{seed}"] = campaign_policies.steps_of(chosen)
    if not base:
        steps = base_steps(args.size, overrides)
        # Processes of different seeds need no lock on it when it is there.
        if not _are_finished(args.folder / "base", steps):
            plans = {args.folder / "base": steps, **plans}
    is_whole = True
    if not args.measure_only:
        for folder, steps in plans.items():
            sys.stderr.write(f"{folder}\n")
            is_whole = run(folder, steps, deadline=deadline, program=program)
            if not is_whole:
                sys.stderr.write("time is over: start again to go on\n")
                break
    record = campaign_record.collect(
        args.folder,
        size=args.size,
        base=base,
        overrides=overrides,
        title=args.title,
        policies=campaign_policies.Campaign(
            seed_chain(args.size, 0, base or _NEW_BASE, overrides)
        ).policies(),
    )
    for path in (args.folder / "record.json", *([args.record] if args.record else [])):
        content = small_files.dumps(record) + b"\n"
        small_files.replace(path, content, writer=str(os.getpid()))
    print(args.folder / "record.json")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except errors.InputError as problem:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(2)
