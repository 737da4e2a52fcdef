"""Each RL algorithm on a policy of SFT and on an aligned one: eight accuracies.

    python -m benchmarks.algorithm_table --chain=runs/small --workdir=runs/table --size=small \
        --jobs=3 --out=FILE.json

The chain is a finished `pipeline`, whose corpus, policies and results are used: SFT and alignment
are in its summary, and RLVR after alignment is GRPO. What the table lacks is trained and evaluated
here with the chain's own arguments, `--jobs` at a time; an interrupted run goes on. One seed.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

Json = Any
STARTS = {"sft": "SFT", "align": "PRISM"}
ALGORITHMS = ("grpo", "dapo", "gspo")
_IN_CHAIN = ("align", "grpo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One line of the table: a policy that RLVR starts from, and an algorithm."""

    start: str
    algorithm: str
    chain: pathlib.Path
    workdir: pathlib.Path
    size: str
    seed: int
    rlvr: tuple[str, ...]
    evaluate: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return f"{self.start}_{self.algorithm}"

    def commands(self) -> list[list[str]]:
        """Return the arguments of training and evaluation."""
        seed, corpus = f"--config.seed={self.seed}", self.chain / "corpus" / "rl"
        trained = self.workdir / self.name
        return [
            [
                "rlvr",
                f"--config=configs/rlvr.py:{self.size},{self.algorithm}",
                f"--workdir={trained}",
                seed,
                f"--config.model.folder={self.chain / self.start}",
                f"--config.prompts.path={corpus / 'train.parquet'}",
                *self.rlvr,
            ],
            [
                "evaluate",
                f"--config=configs/evaluate.py:{self.size}",
                f"--workdir={trained}_evaluation",
                seed,
                f"--config.policy.folder={trained}",
                f"--config.prompts.path={corpus / 'test.parquet'}",
                *self.evaluate,
            ],
        ]


def run(line: Run) -> dict[str, Json]:
    """Train and evaluate one line; RuntimeError with the end of its output if a command fails."""
    begun = time.monotonic()
    for command in line.commands():
        log = line.workdir / f"{line.name}_{command[0]}.log"
        with log.open("a", encoding="utf-8") as file:
            called = [sys.executable, "-m", "prism_jax", *command]
            status = subprocess.run(called, stdout=file, stderr=subprocess.STDOUT, check=False)
        if status.returncode:
            end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
            raise RuntimeError(f"{line.name}: {command[0]} ended with {status.returncode}\n{end}")
    line_result = result(line, seconds=time.monotonic() - begun)
    print(line.name, json.dumps(line_result["accuracy"]), file=sys.stderr, flush=True)
    return line_result


def result(line: Run, *, seconds: float) -> dict[str, Json]:
    """Return the accuracies in a line's folders, and the time of its commands."""
    greedy = _read(line.workdir / f"{line.name}_evaluation" / "summary.json")["greedy"]
    metrics = (line.workdir / line.name / "metrics.jsonl").read_text(encoding="utf-8")
    steps = [json.loads(text) for text in metrics.splitlines()]
    # DAPO draws nothing in a step that enough groups were left over for.
    sampled_steps = [step for step in steps if "reward/accuracy_mean" in step]
    return {
        "start": STARTS[line.start],
        "algorithm": line.algorithm,
        "accuracy": greedy["accuracy"],
        "format_valid": greedy["format_valid"],
        "response_tokens": greedy["response_tokens"],
        "num_steps": len(steps),
        "sampled_accuracy_by_drawn_step": [
            round(s["reward/accuracy_mean"], 4) for s in sampled_steps
        ],
        "wall_seconds": round(seconds, 1),
        "commands": [" ".join(("python -m prism_jax", *c)) for c in line.commands()],
    }


def _read(path: pathlib.Path) -> Json:
    return json.loads(path.read_text(encoding="utf-8"))


def _of_chain(summary: Json, stage: str, algorithm: str | None) -> dict[str, Json]:
    """Return a line that the chain has already."""
    return {
        "start": STARTS["align" if stage == "rlvr" else stage],
        "algorithm": algorithm,
        "accuracy": summary["accuracy"][stage],
        "format_valid": summary["format_valid"][stage],
        "wall_seconds": summary["wall_seconds"][stage],
        "commands": [summary["commands"][stage]],
    }


def main() -> None:
    """Fill the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chain", type=pathlib.Path, required=True)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--size", default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--rlvr", action="append", default=[], help="further argument of rlvr")
    parser.add_argument("--evaluate", action="append", default=[], help="the same, of evaluate")
    args = parser.parse_args()
    command = " ".join(("python -m benchmarks.algorithm_table", *sys.argv[1:]))
    # In a process of its own, which does not hold the device's memory while others train.
    query = [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"]
    device = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    summary = _read(args.chain / "summary.json")
    args.workdir.mkdir(parents=True, exist_ok=True)
    lines = [
        Run(
            start=start,
            algorithm=algorithm,
            chain=args.chain,
            workdir=args.workdir,
            size=args.size,
            seed=args.seed,
            rlvr=tuple(args.rlvr),
            evaluate=tuple(args.evaluate),
        )
        for start in STARTS
        for algorithm in ALGORITHMS
        if (start, algorithm) != _IN_CHAIN
    ]
    table = [_of_chain(summary, stage, None) for stage in STARTS]
    table.append(_of_chain(summary, "rlvr", "grpo"))
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(run, line) for line in lines]
        for done in concurrent.futures.as_completed(waiting):
            if done.exception() is not None:
                continue
            table.append(done.result())
            record = {"command": command, "device": device, "table": table}
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for done in waiting:
        done.result()


if __name__ == "__main__":
    main()
