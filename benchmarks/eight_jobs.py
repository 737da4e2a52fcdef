"""A job of `benchmarks.eight_gpus` or `one_gpu`: its command, processes and measurements."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from benchmarks import eight_inputs, eight_process
from prism_jax import configuration

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_MEMORY_FRACTION = "0.94"  # of a GPU, for JAX; as docs and configurations advise
# GiB of pinned memory that JAX may take of the host, 64 by default: a save copies the states of a
# process there, and those of large models are larger.
_HOST_LIMIT = "100"
_ERROR_CHARS = 600
_RESUMED = "resumed"

Json = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run of one configuration in one layout."""

    inputs: eight_inputs.Inputs
    stage: str
    layout: str
    num_devices: int  # of the machine
    num_steps: int
    mean_tokens: int
    limit_seconds: float
    changes: tuple[str, ...] = ()  # of the configuration, FIELD=VALUE
    save_steps: tuple[int, ...] | None = None  # see `eight_process.Settings`
    last_step: int | None = None
    cache: str | None = None  # of compiled programs; None: one of this job alone

    @property
    def name(self) -> str:
        """Return the name of the job among those of all sizes."""
        return f"{self.inputs.size}.{self.stage}.{self.layout}"

    @property
    def result(self) -> pathlib.Path:
        """Return the file of the stored result."""
        return self.inputs.folder / "done" / f"{self.name}.json"

    @property
    def workdir(self) -> pathlib.Path:
        """Return the folder of the run; a resumed run has that of the run it continues."""
        layout = "one" if self.layout == _RESUMED else self.layout
        return self.inputs.folder / "runs" / f"{self.inputs.size}.{self.stage}.{layout}"

    @property
    def notes(self) -> pathlib.Path:
        """Return the folder of the settings, the log and the notes of the processes."""
        return self.inputs.folder / "notes" / self.name

    @property
    def compiled(self) -> pathlib.Path:
        """Return the folder of compiled programs."""
        return self.inputs.folder / "compiled" / (self.cache or self.name)

    @property
    def used_devices(self) -> int:
        """Return the number of devices that the job uses."""
        fewer = {"half": self.num_devices // 2, _RESUMED: self.num_devices // 2, "single": 1}
        return fewer.get(self.layout, self.num_devices)

    @property
    def num_processes(self) -> int:
        """Return the number of processes."""
        return self.num_devices if self.layout == "each" else 1

    @property
    def is_resumable(self) -> bool:
        """Return whether the run keeps the checkpoint of the step before the last.

        The disk holds three of 4b, not of 8b.
        """
        return self.stage == "sft" and self.layout == "one" and self.inputs.size != "8b"

    def arguments(self) -> list[str]:
        """Return the command of prism_jax: the configuration, paths and the number of steps."""
        inputs, steps = self.inputs, f"--config.train.num_steps={self.num_steps}"
        policy = f"--config.model.folder={inputs.policy}"
        prompts = "--config.prompts.path="
        of_stage = {
            "sft": [
                policy,
                f"--config.data.train={inputs.demonstrations}",
                "--config.train.num_epochs=None",
                steps,
            ],
            "warmup": [
                f"--config.model.folder={inputs.discriminator}",
                f"--config.data.train={inputs.pairs}",
                "--config.train.num_epochs=None",
                steps,
            ],
            "align": [
                policy,
                f"--config.discriminator.folder={inputs.discriminator}",
                f"{prompts}{inputs.corpus / 'align' / 'train.parquet'}",
                steps,
            ],
            "rlvr": [policy, f"{prompts}{inputs.corpus / 'rl' / 'train.parquet'}", steps],
            "evaluate": [
                f"--config.policy.folder={inputs.policy}",
                f"{prompts}{inputs.corpus / 'rl' / 'test.parquet'}",
            ],
        }
        given = [
            self.stage,
            f"--config={_ROOT / 'configs' / self.stage}.py:{inputs.size}",
            f"--workdir={self.workdir}",
            *of_stage[self.stage],
        ]
        if self.is_resumable or self.layout == _RESUMED:
            given.append(f"--config.checkpoint.save_every_steps={self.num_steps - 1}")
        if self.layout == _RESUMED:
            given.append(f"--config.resume.step={self.num_steps - 1}")
        return given + [f"--config.{change}" for change in (*self.changes, *self._for_tiny())]

    def _for_tiny(self) -> list[str]:
        """Return room for the format: `tiny` has responses of 16 tokens, and rows of 128."""
        changes = {
            "sft": "data.row_tokens=512",
            "align": "rollout.max_response_tokens=64",
            "rlvr": "rollout.max_response_tokens=64",
            "evaluate": "max_tokens=64",
        }
        is_changed = self.inputs.size == "tiny" and self.stage in changes
        return [changes[self.stage]] if is_changed else []

    def command(self) -> list[str]:
        """Return the processes' command."""
        if self.num_processes == 1:
            return [sys.executable, "-m", "benchmarks.eight_process", *self.arguments()]
        pod = ["bash", str(_ROOT / "launch" / "local_pod.sh"), str(self.num_processes)]
        return [*pod, "--", *self.arguments()]

    def environment(self, *, has_gpus: bool) -> dict[str, str]:
        """Return the variables of the processes."""
        variables = dict(os.environ)
        variables |= {
            "PYTHONPATH": str(_ROOT),
            "PRISM_PYTHON": str(self.notes / "python"),
            eight_process.SETTINGS: str(self.notes / "settings.json"),
            "JAX_COMPILATION_CACHE_DIR": str(self.compiled),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if has_gpus:
            variables.setdefault("JAX_PLATFORMS", "cuda,cpu")  # an error where there is no GPU
            variables.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _MEMORY_FRACTION)
            variables.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", _HOST_LIMIT)
            if self.num_processes == 1:
                # Those that the caller sees, where it names some.
                numbers = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
                    str(number) for number in range(self.num_devices)
                )
                shown = numbers.split(",")[: self.used_devices]
                variables["CUDA_VISIBLE_DEVICES"] = ",".join(shown)
            return variables
        variables["JAX_PLATFORMS"] = "cpu"
        flags = [flag for flag in variables.get("XLA_FLAGS", "").split() if "_count=" not in flag]
        if self.num_processes == 1:  # local_pod.sh gives each process one
            flags.append(f"--xla_force_host_platform_device_count={self.used_devices}")
        variables["XLA_FLAGS"] = " ".join(flags)
        return variables


def read(path: pathlib.Path) -> Json | None:
    """Return what a JSON file holds, None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def run(job: Job) -> Json:
    """Run the job to its end or its limit, store its measurements or its error; return them."""
    if job.layout == _RESUMED:
        if not job.workdir.exists():
            raise SystemExit(f"{job.name}: run --part={job.stage}.one first, it left no folder")
    else:
        shutil.rmtree(job.workdir, ignore_errors=True)
    job.workdir.parent.mkdir(exist_ok=True)
    job.result.parent.mkdir(exist_ok=True)
    _prepare(job)
    code, seconds = _wait(job)
    result: Json = {
        "layout": job.layout,
        "num_devices": job.used_devices,
        "command": ["python", "-m", "prism_jax", *job.arguments()],
        "seconds": seconds,
        "processes": [json.loads(p.read_text()) for p in sorted(job.notes.glob("process_*.json"))],
    }
    if code != 0:
        result["error"] = f"exit code {code}: {(job.notes / 'log').read_text()[-_ERROR_CHARS:]}"
        result["metrics"] = _rows(job)  # of the steps before
    else:
        result |= _measurements(job)
    job.result.write_text(json.dumps(result, indent=1) + "\n")
    if not (job.is_resumable and code == 0):
        shutil.rmtree(job.workdir, ignore_errors=True)
    return result


def _prepare(job: Job) -> None:
    """Write the settings, and an interpreter that runs the watched program for the launcher."""
    shutil.rmtree(job.notes, ignore_errors=True)
    job.notes.mkdir(parents=True)
    settings = eight_process.Settings(
        begun=time.time(),
        notes=str(job.notes),
        tokenizer=str(job.inputs.tokenizer),
        mean_tokens=job.mean_tokens,
        save_steps=None if job.save_steps is None else list(job.save_steps),
        last_step=job.last_step,
    )
    (job.notes / "settings.json").write_text(json.dumps(dataclasses.asdict(settings)))
    script = job.notes / "python"
    # The launcher asks the interpreter for a free port too; the program comes as `-m prism_jax`.
    script.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = -c ] && exec "{sys.executable}" "$@"\n'
        f'shift 2\nexec "{sys.executable}" -m benchmarks.eight_process "$@"\n'
    )
    script.chmod(0o755)


def _wait(job: Job) -> tuple[int, float]:
    """Run the processes, ended at the limit; return the exit code and the seconds."""
    begun = time.monotonic()
    environment = job.environment(has_gpus=job.inputs.size != "tiny")
    with (job.notes / "log").open("w") as log:
        child = subprocess.Popen(
            job.command(),
            cwd=_ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(job.limit_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            log.write(f"\nkilled after {job.limit_seconds} s\n")
            code = 124
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    return code, time.monotonic() - begun


def _rows(job: Job) -> list[Json]:
    """Return the metrics of the finished steps."""
    path = job.workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _measurements(job: Job) -> Json:
    """Return the metrics, the account of the wall time, and the size of the newest checkpoint."""
    if job.stage == "evaluate":
        return {"summary": read(job.workdir / "summary.json")}
    config, _ = configuration.read(job.arguments()[1:], command=job.stage)
    # Written with each save.
    account_file = job.workdir / "goodput.jsonl"
    account = account_file.read_text().splitlines() if account_file.exists() else []
    saved = sorted((job.workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    files = [path for path in (saved[-1].rglob("*") if saved else ()) if path.is_file()]
    measured = {
        "metrics": _rows(job),
        "goodput": json.loads(account[-1]) if account else None,
        "checkpoint_bytes": sum(path.stat().st_size for path in files),
    }
    if job.stage == "sft":
        parts, rows = job.used_devices, config.train.num_rows
        rows = parts if rows == -1 else rows
        places = -(-config.train.step_rows // rows) * rows * config.data.row_tokens
        measured["places_a_step"] = places
    if job.stage == "warmup":
        measured["pairs_a_step"] = config.train.num_pairs
    return measured
