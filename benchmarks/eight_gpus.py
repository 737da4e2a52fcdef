"""Run the shipped configurations on the GPUs of one host, a part a call, and write records.

    python -m benchmarks.eight_gpus --size=4b --list
    python -m benchmarks.eight_gpus --size=4b --folder=DIR --part=inputs
    python -m benchmarks.eight_gpus --size=4b --folder=DIR --part=sft.one --out=DIR/results
    python -m benchmarks.eight_gpus --size=tiny --folder=DIR --part=all         (any machine)

Hardware: 8 GPUs of 80 GB and 240 GB of disk for 4b and 8b; tiny takes a CPU, as `--num_devices`
devices. A part is made for a call of ten minutes, and one that was done before is passed over.

`inputs` makes checkpoints of random weights and a small corpus. A part `STAGE.LAYOUT` then runs
`configs/STAGE.py:SIZE`, changed in nothing but paths and the number of steps. STAGE is sft, warmup,
align, rlvr or evaluate. LAYOUT is one of

  one      one process with all devices
  each     as many processes, a device each, by launch/local_pod.sh
  half     one process with half of the devices
  single   one process with one device; not every configuration fits there
  resumed  (sft) the last step of `one` again, from its checkpoint, on half of the devices

Responses are forced to log-normal lengths and to the format, see `benchmarks.eight_responses`. The
record of a stage, `eight_STAGE_SIZE.json`, is written again after each of its parts, and holds
only the layouts that ran.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys

import jax

from benchmarks import eight_inputs, eight_jobs, eight_records

_SIZES = ("tiny", "4b", "8b")
_STAGES = ("sft", "warmup", "align", "rlvr", "evaluate")
_LAYOUTS = ("one", "each", "half", "single")


def parts() -> list[str]:
    """Return the names of the parts in the order in which they are run."""
    names = ["inputs"]
    for stage in _STAGES:
        names += [f"{stage}.{layout}" for layout in _LAYOUTS]
        if stage == "sft":
            names.insert(names.index("sft.one") + 1, "sft.resumed")
    return names


def run_part(name: str, args: argparse.Namespace) -> bool:
    """Run one part and store its result; return whether it succeeded."""
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    inputs = eight_inputs.Inputs(folder=folder, size=args.size)
    if name == "inputs":
        eight_inputs.write(inputs, mean_tokens=args.mean_tokens)
        eight_inputs.write_discriminator(inputs)
        return True
    if not inputs.pairs.exists():
        raise SystemExit(f"--part={name}: run --part=inputs first, in the same --folder")
    stage, _, layout = name.partition(".")
    job = eight_jobs.Job(
        inputs=inputs,
        stage=stage,
        layout=layout,
        num_devices=args.num_devices,
        num_steps=args.num_steps,
        mean_tokens=args.mean_tokens,
        limit_seconds=args.limit_seconds,
    )
    done = eight_jobs.read(job.result)
    if done is not None and not args.again:
        print(f"{name}: done before", file=sys.stderr)
        return "error" not in done
    result = eight_jobs.run(job)
    record = eight_records.write(job, args.out or folder / "results")
    outcome = result.get("error", record["ratio"])
    print(f"{name}: {outcome}", file=sys.stderr)
    return "error" not in result


def _num_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return len(done.stdout.splitlines()) if done.returncode == 0 else 0


def main(arguments: list[str] | None = None) -> None:
    """Run a part, or all of them; the exit code is 1 where one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=_SIZES, required=True)
    parser.add_argument("--folder", type=pathlib.Path, help="of models, corpus, runs and results")
    parser.add_argument("--part", choices=(*parts(), "all"))
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--again", action="store_true", help="run a part that was done before")
    parser.add_argument("--num_steps", type=int, default=4, help="of a run, at least 3")
    parser.add_argument("--num_devices", type=int, help="without GPUs: of the CPU (8)")
    parser.add_argument("--mean_tokens", type=int, help="of a response, about (1000; tiny: 40)")
    parser.add_argument("--limit_seconds", type=float, default=570.0, help="of a part")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the records")
    args = parser.parse_args(arguments)
    if args.list:
        print("\n".join(parts()))
        return
    if args.folder is None or args.part is None:
        parser.error("--folder and --part must be given, or --list")
    if args.num_steps < 3:
        parser.error(f"--num_steps must be >= 3, got {args.num_steps}")
    num_gpus = _num_gpus()
    if num_gpus and args.num_devices is not None:
        parser.error(f"--num_devices is for machines without GPUs; this one has {num_gpus}")
    if not num_gpus and args.size != "tiny":
        parser.error(f"--size={args.size} needs GPUs, and nvidia-smi lists none")
    args.mean_tokens = args.mean_tokens or (40 if args.size == "tiny" else 1000)
    args.num_devices = num_gpus or args.num_devices or 8
    if args.num_devices < 2:
        parser.error("at least 2 devices are needed, got 1")
    # The memory of the GPUs is for the parts, whose runs are processes.
    jax.config.update("jax_platforms", "cpu")
    names = parts() if args.part == "all" else [args.part]
    have_run = [run_part(name, args) for name in names]
    if not all(have_run):
        sys.exit(1)


if __name__ == "__main__":
    main()
