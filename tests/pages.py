"""Run the commands of a page of docs/ in this process, with tiny files for the large ones.

Blocks of `json`, `python` and `text` are files: the last name in backticks before a block is its
path. Blocks of `bash` are run line by line. A command of a stage must be right as it stands, with
its own size; then its size becomes `tiny`, on one device.
"""

import dataclasses
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping

from prism_jax import configuration, main
from prism_jax.commands import evaluate, pairs
from prism_jax.stages.align import config as align_config
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.sft import config as sft_config
from prism_jax.stages.warmup import config as warmup_config

ROOT = pathlib.Path(__file__).parents[1]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SHOWN = re.compile(r"^```bash\n([^`]*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"`([\w./-]+\.\w+)`")
_CONFIG = re.compile(r"--config=configs/(\w+)\.py:([\w]+)(.*)")
_KINDS = {
    "sft": sft_config.Config,
    "warmup": warmup_config.Config,
    "align": align_config.Config,
    "rlvr": rlvr_config.Config,
    "evaluate": evaluate.Config,
    "pairs": pairs.Config,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """The files that a page shows, and its commands in order, each as words."""

    files: Mapping[str, str]
    commands: tuple[tuple[str, ...], ...]


def read(name: str) -> Page:
    """Return a page of docs/."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    files, commands, end = {}, [], 0
    for block in _BLOCK.finditer(text):
        language, body = block.groups()
        if language == "bash":
            lines = body.replace("\\\n", " ").splitlines()
            commands += [tuple(words) for line in lines if (words := shlex.split(line))]
        else:
            path = _NAME.findall(text[end : block.start()])[-1]
            assert path not in files, f"{path} is shown twice"
            files[path] = body
        end = block.end()
    return Page(files=files, commands=tuple(commands))


def shown(name: str) -> list[tuple[tuple[str, ...], str]]:
    """Return the commands of a page that have their output below them, and the output."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return [
        (tuple(shlex.split(body.replace("\\\n", " "))), output)
        for body, output in _SHOWN.findall(text)
    ]


def write(page: Page, folder: pathlib.Path) -> None:
    """Write the files that a page shows."""
    for name, body in page.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body, encoding="utf-8")


def run(
    command: tuple[str, ...],
    *,
    downloads: Mapping[str, pathlib.Path],
    tiny: Mapping[str, tuple[str, ...]],
) -> None:
    """Run a command in the working directory; fail where it fails.

    Args:
      downloads: folders that stand for repositories of the hub.
      tiny: further arguments of each command in its tiny size.
    """
    words = list(command)
    for start, act in _ACTS.items():
        if tuple(words[: len(start)]) == start:
            act(words[len(start) :])
            return
    if words[:2] == ["hf", "download"]:
        _download(words[2:], downloads)
        return
    assert words[:3] == ["python", "-m", "prism_jax"], f"an unknown command: {shlex.join(words)}"
    argv = words[3:]
    stage = argv[0]
    assert stage in main.COMMANDS, stage
    if stage in _KINDS:
        argv = _in_tiny(argv)
    code = _exit_code([*argv, *tiny.get(stage, ())])
    assert code == 0, f"exit code {code} of {shlex.join(argv)}"


def _in_tiny(argv: list[str]) -> list[str]:
    """Check a stage's arguments with their own size; return those of the tiny one."""
    given = _CONFIG.fullmatch(argv[1])
    assert given is not None, argv[1]
    stage, size, options = given.groups()
    assert stage == argv[0]
    whole = f"--config={ROOT}/configs/{stage}.py:{size}{options}"
    config, _ = configuration.read([whole, *argv[2:]], command=stage)
    configuration.parse(_KINDS[stage], config)
    small = f"--config={ROOT}/configs/{stage}.py:tiny{options}"
    return [stage, small, *argv[2:], "--config.mesh.num_devices=1"]


def _exit_code(argv: list[str]) -> int:
    try:
        return main.main(argv)
    except SystemExit as stop:
        return stop.code or 0


def _download(words: list[str], downloads: Mapping[str, pathlib.Path]) -> None:
    repository, *options = words
    values = dict(option.removeprefix("--").split("=") for option in options)
    assert values.keys() <= {"local-dir", "repo-type"}
    is_data = values.get("repo-type") == "dataset"
    source = downloads[repository]
    assert is_data != (source / "config.json").exists(), "a data set must be named as one"
    shutil.copytree(source, values["local-dir"])


def _extras(words: list[str]) -> None:
    """Check that the project has the extras that a line installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert words[0] == "-e"
    extras = re.fullmatch(r"\.\[(.+)\]", words[1])
    assert set(extras[1].split(",")) <= project["optional-dependencies"].keys()


def _python(words: list[str]) -> None:
    subprocess.run([sys.executable, "-c", *words], check=True, stdout=subprocess.DEVNULL)


def _dry_run(words: list[str]) -> None:
    assert "--dry-run" in words[: words.index("--")], "nothing is rented"
    subprocess.run(["bash", *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def _environment(words: list[str]) -> None:
    name, _, value = words[0].partition("=")
    # Read by JAX alone, on GPUs.
    assert name == "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert 0 < float(value) < 1


def _nothing(words: list[str]) -> None:
    del words


_ACTS: dict[tuple[str, ...], Callable[[list[str]], None]] = {
    ("python3", "-m", "venv", ".venv", "&&", "source", ".venv/bin/activate"): _nothing,
    ("pip", "install"): _extras,
    ("export",): _environment,
    ("python", "-c"): _python,
    ("bash",): _dry_run,
}


def links(name: str) -> list[str]:
    """Return the links of a page to files and headings that are not there."""
    path = ROOT / "docs" / name
    wrong = []
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        other = (path.parent / file) if file else path
        if "://" in target:
            continue
        if not other.exists() or (heading and heading not in _headings(other)):
            wrong.append(target)
    return wrong


def _headings(path: pathlib.Path) -> set[str]:
    lines = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}
