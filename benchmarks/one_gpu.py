"""Run the shipped configurations of one GPU for real, in parts, and write records.

    python -m benchmarks.one_gpu --size=4b_one_gpu --list
    python -m benchmarks.one_gpu --size=4b_one_gpu --folder=DIR --parts inputs sft.cold sft.warm
    python -m benchmarks.one_gpu --size=4b_one_gpu --folder=DIR --parts rlvr align
    python -m benchmarks.one_gpu --size=tiny --folder=DIR              (all parts, any machine)

Hardware: one GPU of 80 GB, 128 GB of memory and 50 GB of disk; tiny takes a CPU. A part is made for
a call of ten minutes, one that was done before is passed over, and one that fails does not stop the
others. All inputs are made on the machine, see `benchmarks.eight_inputs`.

  inputs    the policy and the corpus; the discriminator is made before the first part that reads it
  sft.cold  no compiled programs are kept from before; ends after three steps
  sft.warm  the same once more, with 130 steps and three saves, the last of which is waited for
  rlvr      8 prompts x 16 responses of at most 2048 tokens, 112 of them at a time
  align     4 prompts x 16 responses, as shipped
  warmup    pairs, as shipped
  upcycle   a dense model of 2B becomes the trunk of a discriminator, on the GPU

Of the configurations nothing is changed but paths, the number of steps and what is said here. Only
sft.warm saves; the state of align, 58 GB, would not fit the disk beside its inputs. Each part
writes `one_gpu_STAGE.json`, besides first_step, save_stall, rlvr_step and align_one_gpu.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import time
import traceback

import jax

from benchmarks import eight_inputs, eight_jobs, one_records

_SIZES = ("tiny", "2b_one_gpu", "4b_one_gpu")
_SFT_STEPS = 130
_MEAN_TOKENS, _TINY_TOKENS = 600, 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A run of a stage."""

    stage: str
    num_steps: int
    seconds: int  # it takes about, with 4b
    mean_tokens: int = _MEAN_TOKENS  # of a response, before the limits
    changes: tuple[str, ...] = ()  # but for tiny
    save_steps: tuple[int, ...] = ()
    last_step: int | None = None


PARTS = {
    # As many steps as the next one has, or other programs would be compiled.
    "sft.cold": Part(stage="sft", num_steps=_SFT_STEPS, seconds=110, last_step=3),
    "sft.warm": Part(stage="sft", num_steps=_SFT_STEPS, seconds=150, save_steps=(10, 70, 130)),
    "rlvr": Part(
        stage="rlvr",
        num_steps=5,
        seconds=270,
        mean_tokens=1550,
        changes=(
            "rollout.num_prompts=8",
            "rollout.max_response_tokens=2048",
            # Without a number not quite all would fit, and three quarters of the slots would be
            # short ones, see `prism_jax.rollout.memory`.
            "rollout.batch_responses=112",
        ),
    ),
    "align": Part(stage="align", num_steps=5, seconds=270),
    "warmup": Part(stage="warmup", num_steps=5, seconds=150),
}
_OTHERS = {"inputs": 60, "upcycle": 60}  # and their seconds
NAMES = ("inputs", *PARTS, "upcycle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The inputs and the folder of records that all parts share."""

    inputs: eight_inputs.Inputs
    out: pathlib.Path

    @property
    def is_tiny(self) -> bool:
        """Return whether it is a trial."""
        return self.inputs.size == "tiny"

    def job(self, name: str, *, limit_seconds: float) -> eight_jobs.Job:
        """Return the job of a part."""
        part = PARTS[name]
        _, _, layout = name.partition(".")
        return eight_jobs.Job(
            inputs=self.inputs,
            stage=part.stage,
            layout=layout or "single",
            num_devices=1,
            num_steps=part.num_steps,
            mean_tokens=_TINY_TOKENS if self.is_tiny else part.mean_tokens,
            limit_seconds=limit_seconds,
            changes=() if self.is_tiny else part.changes,
            save_steps=part.save_steps,
            last_step=part.last_step,
            cache=f"{self.inputs.size}.{part.stage}",
        )

    def run(self, name: str, *, limit_seconds: float) -> str:
        """Run a part and write its records; return a line about it."""
        if name == "inputs":
            tokens = _TINY_TOKENS if self.is_tiny else _MEAN_TOKENS
            eight_inputs.write(self.inputs, mean_tokens=tokens)
            return "written"
        if not self.inputs.pairs.exists():
            raise ValueError("the part inputs must be run first, in the same --folder")
        if name == "upcycle":
            return self._upcycle(limit_seconds)
        if PARTS[name].stage in ("warmup", "align"):
            eight_inputs.write_discriminator(self.inputs)
        job = self.job(name, limit_seconds=limit_seconds)
        if name == "sft.cold":
            shutil.rmtree(job.compiled, ignore_errors=True)
        result = eight_jobs.run(job)
        logs = self.out / "logs"
        logs.mkdir(exist_ok=True)
        shutil.copy(job.notes / "log", logs / f"{job.name}.log")
        shutil.copy(job.result, logs / f"{job.name}.json")
        return self._written(one_records.of_stage(job, result))

    def _upcycle(self, limit_seconds: float) -> str:
        """Make the trunk of a discriminator by the command, and remove it."""
        inputs = self.inputs
        eight_inputs.write_dense(inputs, inputs.dense, inputs.dense_size)
        shutil.rmtree(inputs.trunk, ignore_errors=True)
        command = [sys.executable, "-m", "prism_jax", "upcycle"]
        command += [f"--from={inputs.dense}", f"--to={inputs.trunk}"]
        begun = time.monotonic()
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=limit_seconds
        )
        seconds = time.monotonic() - begun
        error = done.stderr[-3000:] if done.returncode else None
        record = one_records.of_upcycle(inputs, seconds=seconds, error=error)
        shutil.rmtree(inputs.trunk, ignore_errors=True)
        if inputs.dense != inputs.policy:
            shutil.rmtree(inputs.dense)
        return self._written({record["record"]: record})

    def _written(self, made: one_records.Records) -> str:
        for name, record in made.items():
            (self.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        return "; ".join(f"{name} {record['ratio']}" for name, record in made.items())

    def is_done(self, name: str) -> bool:
        """Return whether a part has succeeded before."""
        if name == "inputs":
            return self.inputs.pairs.exists() and self.inputs.policy.exists()
        if name == "upcycle":
            path = self.out / "one_gpu_upcycle.json"
            return path.exists() and eight_jobs.read(path)["is_met"]
        done = eight_jobs.read(self.job(name, limit_seconds=0).result)
        return done is not None and "error" not in done


def seconds_of(name: str) -> int:
    """Return about how long a part takes with 4b."""
    return _OTHERS[name] if name in _OTHERS else PARTS[name].seconds


def main(arguments: list[str] | None = None) -> None:
    """Run the parts one after the other and print a summary; the exit code is 1 where one failed.

    A part that has not begun when the time is over is left for another call.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=_SIZES, required=True)
    parser.add_argument("--folder", type=pathlib.Path, help="of models, corpus and runs")
    parser.add_argument("--parts", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--list", action="store_true", help="print the parts and their seconds")
    parser.add_argument("--again", action="store_true", help="run parts that were done before")
    parser.add_argument("--seconds", type=float, default=565.0, help="of all parts together")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the records (FOLDER/results)")
    args = parser.parse_args(arguments)
    if args.list:
        print("\n".join(f"{name:9} {seconds_of(name):4} s" for name in NAMES))
        return
    if args.folder is None:
        parser.error("--folder must be given, or --list")
    begun = time.monotonic()
    # The memory of the GPU is for the parts, each of which is a process.
    jax.config.update("jax_platforms", "cpu")
    folder = args.folder.absolute()
    out = (args.out or folder / "results").absolute()
    for path in (folder, out):
        path.mkdir(parents=True, exist_ok=True)
    work = Work(inputs=eight_inputs.Inputs(folder=folder, size=args.size), out=out)
    lines, has_failed = [], False
    for name in args.parts:
        if work.is_done(name) and not args.again:
            lines.append(f"{name}: done before")
            continue
        begun_part, left = time.monotonic(), args.seconds - (time.monotonic() - begun)
        if left < seconds_of(name) / 2:
            lines.append(f"{name}: not begun, {left:.0f} s were left")
            has_failed = True
            continue
        free = shutil.disk_usage(folder).free / 1e9
        print(
            f"{name}: begins at {begun_part - begun:.0f} s, {free:.0f} GB of disk free",
            file=sys.stderr,
            flush=True,
        )
        try:
            outcome = work.run(name, limit_seconds=min(left, 2.0 * seconds_of(name)))
        # Any error of a part is its result; the others go on.
        except Exception as error:
            traceback.print_exc()
            outcome, has_failed = f"failed: {error}", True
        lines.append(f"{name}: {time.monotonic() - begun_part:.0f} s, {outcome}")
        print(lines[-1], file=sys.stderr, flush=True)
        has_failed = has_failed or not work.is_done(name)
    print("\n".join(lines))
    if has_failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
