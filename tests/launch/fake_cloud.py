"""A pretended gcloud, kubectl, sbatch, …: notes each call, answers by rules, plays the workers.

The rules are a file, a JSON object each line: {"match": regular expression of the call as typed,
"times": how often (None: always), "code", "out", "err", "seconds": to wait before, "worker": fail
on this worker alone}. The first that fits and is not used up decides; without one the answer is an
empty success.

`gcloud … tpu-vm ssh` runs its command in a shell for each worker, whose home is FAKE_CLOUD/NODE.I;
`scp` copies into these. Standard library alone: the launchers call it dozens of times.
"""

import fcntl
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

_FOLDER = pathlib.Path(os.environ["FAKE_CLOUD"])


def _answer(call: str) -> dict:
    """Return the rule for this call, and count its use."""
    with (_FOLDER / "turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        with (_FOLDER / "calls").open("a") as calls:
            calls.write(call + "\n")
        path = _FOLDER / "rules"
        rules = [json.loads(line) for line in path.read_text().splitlines()]
        for rule in rules:
            if rule["times"] != 0 and re.search(rule["match"], call):
                rule["times"] -= 1
                path.write_text("".join(json.dumps(other) + "\n" for other in rules))
                return rule
    return {}


def _option(name: str) -> str | None:
    prefix = f"--{name}="
    return next((a.removeprefix(prefix) for a in sys.argv if a.startswith(prefix)), None)


def _on_workers(rule: dict) -> int:
    """Run an ssh command, or copy a file, on the workers it names."""
    verb = sys.argv[4]
    node = sys.argv[5] if verb == "ssh" else sys.argv[6].partition(":")[0]
    homes = sorted(_FOLDER.glob(f"{node}.*"))
    if _option("worker") != "all":
        homes = [_FOLDER / f"{node}.{_option('worker')}"]
    codes = []
    for home in homes:
        if home.name == rule.get("worker"):
            sys.stderr.write(f"{home.name}: connection refused\n")
            codes.append(255)
        elif verb == "scp":
            shutil.copy(sys.argv[5], home / sys.argv[6].partition(":")[2])
        else:
            command = _option("command")
            done = subprocess.run(
                ["bash", "-c", command], env={**os.environ, "HOME": str(home)}, check=False
            )
            codes.append(done.returncode)
    return 1 if any(codes) else 0


def main() -> int:
    """Answer one call."""
    program = pathlib.Path(sys.argv[0]).name
    call = shlex.join([program, *sys.argv[1:]])
    rule = _answer(call)
    if program == "kubectl" and "apply" in sys.argv:
        (_FOLDER / "applied.yaml").write_text(sys.stdin.read())
    time.sleep(rule.get("seconds", 0))
    sys.stdout.write(rule.get("out", ""))
    sys.stderr.write(rule.get("err", ""))
    if "code" not in rule and sys.argv[3:4] == ["tpu-vm"] and sys.argv[4] in ("ssh", "scp"):
        return _on_workers(rule)
    if program == "srun" and "code" not in rule:
        command = [a for a in sys.argv[1:] if not a.startswith("--")]
        start = sys.argv.index(command[0])
        return subprocess.run(sys.argv[start:], check=False).returncode
    return rule.get("code", 0)


if __name__ == "__main__":
    sys.exit(main())
