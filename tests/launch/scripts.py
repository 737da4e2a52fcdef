"""Run a launcher beside the fake cloud: programs, rules, calls, and a stub of the program."""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[2]
_PROGRAMS = ("gcloud", "kubectl", "sbatch", "squeue", "scancel", "scontrol", "srun")

# In place of `python -m prism_jax`: notes how it was started, saves on SIGTERM, and ends with the
# next exit code of $STUB/codes, else 0.
_STUB = """#!/usr/bin/env bash
[ "$1" != -c ] || exec {python} "$@"
trap 'echo "saved"; exit 143' TERM
process="${{PRISM_PROCESS_ID:-$(basename "$HOME")}}"
printf -v whole '[%s]' "$@"
# One write: another process may write its line at the same time.
printf '%s: %s\\n' "$process" "$whole" >>"$STUB/starts"
echo "process $process of ${{PRISM_NUM_PROCESSES:-?}} flags [${{LIBTPU_INIT_ARGS:-}}]"
codes="$STUB/codes.$process"
code=0
if [ -s "$codes" ]; then
  code="$(head -n 1 "$codes")"
  sed -i 1d "$codes"
fi
if [ "$code" = wait ]; then while :; do sleep 0.05; done; fi
if [ "$code" = stuck ]; then trap '' TERM; while :; do sleep 0.05; done; fi
for argument in "$@"; do
  case "$argument" in
    --workdir=* | --to=*) folder="${{argument#*=}}" ;;
  esac
done
# A bucket is what the fake cloud answers for, and no folder of this machine.
if [ "$code" = 0 ] && [[ "${{folder:-}}" = /* ]]; then
  mkdir -p "$folder"
  touch "$folder/finished.json" "$folder/summary.json" "$folder/config.json"
fi
exit "$code"
"""


class Cloud:
    """The folder of a fake cloud, and the environment that leads to it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.started: list[subprocess.Popen] = []
        programs = folder / "programs"
        programs.mkdir(parents=True)
        source = (ROOT / "tests/launch/fake_cloud.py").read_text()
        for name in _PROGRAMS:
            (programs / name).write_text(f"#!{sys.executable} -IS\n{source}")
            (programs / name).chmod(0o755)
        self.stub = folder / "stub" / "python"
        self.stub.parent.mkdir()
        self.stub.write_text(_STUB.format(python=sys.executable))
        self.stub.chmod(0o755)
        self.rules()
        hidden = ("TOKEN", "_KEY", "SECRET", "PASSWORD", "CREDENTIAL", "XLA_FLAGS")
        kept = {k: v for k, v in os.environ.items() if not any(word in k for word in hidden)}
        self.environment = kept | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "FAKE_CLOUD": str(folder),
            "STUB": str(self.stub.parent),
            "HOME": str(folder),
            "PRISM_PYTHON": str(self.stub),
            "PRISM_POD_STATE": str(folder / "pods"),
            "PRISM_SLURM_STATE": str(folder / "slurm"),
            "PRISM_POLL_SECONDS": "0.05",
            "PRISM_RETRY_SECONDS": "0",
            "PRISM_RESTART_SECONDS": "0",
            "JAX_PLATFORMS": "cpu",
        }

    def rules(self, *rules: dict) -> None:
        """Set how calls are answered; a rule holds once unless it says how often."""
        lines = [json.dumps({"times": 1} | rule) for rule in rules]
        (self.folder / "rules").write_text("".join(line + "\n" for line in lines))

    def calls(self) -> list[str]:
        """Return all calls so far, as typed."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def codes(self, process: str, *codes: int | str) -> None:
        """Set what the starts of a process end with."""
        path = self.stub.parent / f"codes.{process}"
        path.write_text("".join(f"{code}\n" for code in codes))

    def starts(self) -> list[str]:
        """Return how the program was started each time, processes in order."""
        path = self.stub.parent / "starts"
        return sorted(path.read_text().splitlines()) if path.exists() else []

    def worker(self, name: str) -> pathlib.Path:
        """Make the home of a worker of a TPU VM, its environment installed."""
        home = self.folder / name
        python = home / "prism_jax/.venv/bin/python"
        python.parent.mkdir(parents=True)
        python.symlink_to(self.stub)
        size = subprocess.run(
            ["cksum"], stdin=(ROOT / "requirements.txt").open(), capture_output=True, check=True
        ).stdout.decode()
        (home / "prism_jax/.venv/prism_stamp").write_text(size.rstrip("\n"))
        return home

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        """Start a launcher in a session of its own."""
        # Tests in the background of a shell ignore SIGINT, and so would a script that they start.
        process = subprocess.Popen(
            ["env", "--default-signal=INT,HUP", "bash", f"launch/{script}", *arguments],
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Run a launcher to its end; return exit code, standard output and error."""
        process = self.start(script, *arguments, **environment)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        return process.returncode, out, err


def wait_for(condition, *, seconds: float = 30) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.02)


def plain(text: str, names: Sequence[pathlib.Path]) -> str:
    """Return the text without the paths of this machine."""
    for number, path in enumerate(names):
        text = text.replace(str(path), ("ROOT", "FOLDER")[number])
    return text.replace("setpriv --pdeathsig KILL ", "")  # not on every machine
