"""All stages in a row as a user launches them, while processes are killed; prints what came out.

    python -m tests.chain_campaign FOLDER [--processes=4] [--seconds=60] [--json=FILE]

`launch/pipeline.sh` runs SFT, upcycling, warm-up, alignment, RLVR, evaluation and export at tiny
size, once undisturbed as one process with all devices, once as several processes of one device
each, of which one is killed every so many seconds, and one early in each stage. Where a start
takes longer than that, the next kill waits for a checkpoint. The pairs are given, since a model
this small writes no response that could become one. Both must end with the same metrics and the
same model. `tests.campaign_page` puts the result into docs/pods.md. FOLDER keeps the compiled
programs and the undisturbed run.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
from safetensors import numpy as safetensors

from tests import pods
from tests.stages import rl_run, sft_run

_ROOT = pathlib.Path(__file__).parents[1]
_STAGES = ("sft", "warmup", "align", "rlvr")
# Without a reward that differs, RLVR's gradient would be rounding errors, which Adam makes large.
_REWARD = """
def score(sample):
    letters = [ord(letter) % 2 for letter in sample["response"]]
    return {"total": sum(letters) / max(1, len(letters))}
"""
_STEPS = {
    "sft": (
        "train.num_steps=24",
        "train.num_rows=4",
        "data.row_examples=1",
        "optim.warmup_fraction=None",
        "optim.warmup_steps=0",
    ),
    "warmup": (
        "train.num_steps=12",
        "train.num_pairs=4",
        "evaluate.every_steps=6",
        "optim.warmup_fraction=0.0",
        "rows.num_rows=4",
    ),
    "align": (
        "train.num_steps=6",
        "rollout.num_responses=4",
        "rollout.max_response_tokens=12",
        "honesty.every_steps=None",
        "rows.num_rows=4",
        "discriminator.rows.num_rows=4",
    ),
    "rlvr": (
        "train.num_steps=6",
        "rollout.num_responses=4",
        "rollout.max_response_tokens=12",
        "reference.loss_coefficient=0.1",
        "rows.num_rows=4",
    ),
    "evaluate": ("max_tokens=12", "batch_responses=4"),
}


def _prepare(folder: pathlib.Path) -> None:
    """Write data, pairs and a base model."""
    rl_run.write(folder)
    (folder / "demonstrations").mkdir()
    sft_run.write(folder / "demonstrations", num_rows=8)
    made = folder / "made"
    arguments = sft_run.arguments(folder / "demonstrations", made, "--config.train.num_steps=1")
    arguments = [one for one in arguments if "model.folder" not in one]
    arguments.append(f"--config.model.folder={folder / 'tok'}")
    if rl_run.run_arguments(arguments) != 0:
        raise RuntimeError("the base model could not be made")
    if rl_run.run_arguments(["export", f"--workdir={made}", f"--to={folder / 'base'}"]) != 0:
        raise RuntimeError("the base model could not be exported")


def _command(files: pathlib.Path, root: pathlib.Path, launcher: list[str]) -> list[str]:
    command = ["bash", "launch/pipeline.sh", "--size", "tiny", "--root", str(root)]
    command += ["--base", str(files / "base")]
    command += ["--demonstrations", str(files / "demonstrations" / "train.json")]
    command += ["--align-prompts", str(files / "corpus" / "align" / "train.parquet")]
    for name in ("--rl-prompts", "--test-prompts"):
        command += [name, str(files / "corpus" / "rl" / "train.parquet")]
    for stage, fields in _STEPS.items():
        fields = (*fields, "mesh.num_devices=None")
        if stage == "rlvr":
            fields = (*fields, f"rewards.custom={files / 'reward.py'}:score")
        if stage in _STAGES:
            fields = (*fields, "checkpoint.save_every_steps=2")
        for field in fields:
            command += ["--args", f"{stage}=--config.{field}"]
    return [*command, "--", "local_pod.sh", *launcher]


def _workers(root: pathlib.Path) -> dict[int, str]:
    """Return the processes that run a stage in the folder, and which."""
    stages, option = {}, f"--workdir={root}/"
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "prism_jax" in words:
            for word in words:
                if word.startswith(option):
                    stages[int(entry.name)] = word.removeprefix(option)
    return stages


def _checkpoints(root: pathlib.Path) -> set[pathlib.Path]:
    """Return the checkpoints that are complete."""
    return {mark.parent for mark in root.glob("*/checkpoints/*/_CHECKPOINT_METADATA")}


class _Killer:
    """Kills one process of a chain after the other.

    A job that never came further between two kills would never end, so that a kill waits for a
    checkpoint that was not there at the last one, or for the next stage.
    """

    def __init__(self, root: pathlib.Path, *, processes: int, seconds: float, seed: int):
        self.kills: list[str] = []  # stages
        self._root, self._processes, self._seconds = root, processes, seconds
        self._draw = random.Random(seed)
        self._due = time.monotonic() + seconds
        self._seen: set[str] = set()  # stages
        self._saved: set[pathlib.Path] | None = None  # None: nothing to wait for

    def look(self) -> None:
        """Kill a process if it is time."""
        workers = _workers(self._root)
        new = set(workers.values()) - self._seen
        if new:
            # A stage may be shorter than the time between two kills.
            self._seen |= new
            self._due = min(self._due, time.monotonic() + self._seconds / 2)
            self._saved = None
        # Not those that are left of a job that ends already.
        if len(workers) < self._processes or time.monotonic() < self._due:
            return
        saved = _checkpoints(self._root)
        if self._saved is not None:
            if saved - self._saved:
                # Not always at the same moment after a save.
                self._due = time.monotonic() + self._draw.uniform(0.0, self._seconds / 3)
                self._saved = None
            return
        victim = self._draw.choice(sorted(workers))
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            self.kills.append(workers[victim])
            print(f"{time.strftime('%H:%M:%S')} killed a process of {self.kills[-1]}", flush=True)
        self._due, self._saved = time.monotonic() + self._seconds, saved


def _run_chain(
    files: pathlib.Path, root: pathlib.Path, launcher: list[str], *, killer: _Killer | None
) -> dict:
    """Run the chain until it has ended well; return its kills, starts and seconds."""
    environment = {
        **pods.programs(files / "compiled", shares_programs=True),
        "PRISM_GRACE_SECONDS": "20",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": pods.QUICK_FLAGS,
    }
    starts, begun = 0, time.monotonic()
    while True:
        starts += 1
        with (root.parent / f"{root.name}.log").open("a") as log:
            chain = subprocess.Popen(
                _command(files, root, launcher), cwd=_ROOT, env=environment, stdout=log, stderr=log
            )
            while chain.poll() is None:
                time.sleep(0.5)
                if killer is not None:
                    killer.look()
        if chain.returncode == 0:
            kills = [] if killer is None else killer.kills
            return {"kills": kills, "starts": starts, "seconds": time.monotonic() - begun}
        if starts > 50:
            raise RuntimeError(f"the chain did not end in {starts} starts; see {root}.log")


def _differences(root: pathlib.Path, undisturbed: pathlib.Path) -> dict:
    """Return the largest relative difference of a metric, and of a parameter, by stage."""
    result = {}
    for stage in _STAGES:
        rows, wanted = rl_run.rows(root / stage), rl_run.rows(undisturbed / stage)
        if [row["step"] for row in rows] != [row["step"] for row in wanted]:
            raise AssertionError(f"{stage}: the steps differ")
        pairs = [(a.get(k, math.nan), b[k]) for a, b in zip(rows, wanted, strict=True) for k in b]
        metric = max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)
        result[stage] = {"steps": len(rows), "metric": metric}
    models = [_exported(one / "export") for one in (root, undisturbed)]
    if models[0].keys() != models[1].keys():
        raise AssertionError("the exports hold other parameters")
    gaps = [np.abs(models[0][k].astype("f4") - models[1][k].astype("f4")).max() for k in models[0]]
    result["parameter"] = float(max(gaps))
    return result


def _exported(folder: pathlib.Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: array for file in files for name, array in safetensors.load_file(file).items()}


def main(argv: list[str]) -> int:
    """Run both chains; return 1 when they end with different models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0, help="between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args(argv)
    files = options.folder.resolve()
    if not (files / "base").exists():
        shutil.rmtree(files, ignore_errors=True)
        files.mkdir(parents=True)
        _prepare(files)
    (files / "reward.py").write_text(_REWARD)
    undisturbed, disturbed = files / "undisturbed", files / "disturbed"
    shutil.rmtree(disturbed, ignore_errors=True)
    for root in (undisturbed, disturbed):
        if not root.exists():
            root.mkdir()
            shutil.copytree(files / "pairs", root / "pairs")
            (root / "pairs" / "summary.json").write_text("{}\n")
    one = ["1", "--devices", str(options.processes)]
    calm = _run_chain(files, undisturbed, one, killer=None)
    print(f"undisturbed: {calm['seconds']:.0f} s", flush=True)
    killer = _Killer(
        disturbed, processes=options.processes, seconds=options.seconds, seed=options.seed
    )
    several = [str(options.processes), "--max-restarts", "100"]
    killed = _run_chain(files, disturbed, several, killer=killer)
    gaps = _differences(disturbed, undisturbed)
    result = {"processes": options.processes, "kill_seconds": options.seconds} | killed | gaps
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    worst = max(gaps["parameter"], *(gaps[stage]["metric"] for stage in _STAGES))
    spared = set(_STAGES) - set(killed["kills"])
    if spared:
        print(f"nothing was killed in {', '.join(sorted(spared))}", flush=True)
    return int(bool(spared) or not worst < 5e-4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
