"""Command lines: configurations with overrides, and options of the commands without one."""

import contextlib
import importlib
import io
import pathlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

from prism_jax import configuration, main
from prism_jax.stages.align import config as align_config
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.sft import config as sft_config
from prism_jax.stages.warmup import config as warmup_config
from tests.fuzz.target import Target, require

_KINDS = {
    "sft": sft_config.Config,
    "warmup": warmup_config.Config,
    "align": align_config.Config,
    "rlvr": rlvr_config.Config,
}
_VALUES = (
    "0", "-1", "1e309", "nan", "None", "True", "()", "(1,", "('a',)", "''", "x" * 100, "[1,2]",
    "{}", "1.5", "__import__('os')", "(1,2,3)", "é", "\ud800", "-", "=", "9" * 40, "('a','b'),",
    "None None", "lambda: 1", "1_000", "0x10", "\0", "(('a',None),)", "[" * 300, "9**9**9",
)  # fmt: skip
_SIZES = ("tiny", "tiny", "demo", "4b", "tiny,new", "tiny,official", "huge", "", "tiny,,", "\0")
_LOOSE = (
    "--", "-", "--x", "x", "--config", "--workdir=", "--workdir=a", "--config=", "\0",
    "--noconfig", "--nosuch=1", "--config.=1", "--config..=", "--config.seed", "--config.seed.x=1",
)  # fmt: skip


class Configurations(Target):
    """Overrides of a stage's configuration, right and wrong."""

    weight = 3.0
    num_short = 25

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        self._fields = {}
        for stage in _KINDS:
            argv = [f"--config=configs/{stage}.py:tiny", "--workdir=x"]
            config, _ = configuration.read(argv, command=stage)
            self._fields[stage] = list(_leaves(config.to_dict()))

    def make(self, rng: random.Random) -> list:
        """Return a stage and its arguments."""
        stage = rng.choice(list(_KINDS))
        argv = [f"--config=configs/{stage}.py:{rng.choice(_SIZES)}", "--workdir=w"]
        for _ in range(rng.choice((1, 1, 2, 3))):
            field = rng.choice(self._fields[stage])
            if rng.random() < 0.15:
                at = rng.randrange(len(field))
                field = field[:at] + rng.choice(("x", ".", "", "-", "[0]")) + field[at + 1 :]
            sign = rng.choice(("=", "=", "=", "", " "))
            argv.append(f"--config.{field}{sign}{rng.choice(_VALUES)}")
        if rng.random() < 0.1:
            argv.append(rng.choice(_LOOSE))
        return [stage, argv]

    def run(self, given: list) -> None:
        """Read the arguments into the stage's struct."""
        stage, argv = given
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                config, _ = configuration.read(argv, command=stage)
        except SystemExit as stop:
            require(stop.code in (0, None), f"exit code {stop.code}")
            return
        configuration.parse(_KINDS[stage], config)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


_OPTIONS = {
    "generate": ("--model", "--image", "--prompt", "--max_new_tokens", "--temperature", "--seed"),
    "serve": ("--model", "--discriminator", "--name", "--host", "--port", "--api_key_file"),
    "convert": ("--from", "--to", "--direction", "--dtype"),
    "export": ("--workdir", "--to", "--dtype", "--step"),
    "upcycle": ("--from", "--to", "--num_experts"),
    "report": ("--workdir", "--out", "--summary", "--title", "--num_examples"),
    "data": ("build", "numerals", "--kind", "--from", "--to", "--max_bad_rows", "--images"),
    "sft": ("--help", "--config"),
    "nosuch": (),
}
_GIVEN = (
    "", "x", "missing/folder", "-1", "0", "nan", "1e400", "\0", "\ud800", "gs://b/x", "/dev/null",
    "/proc/self/mem", ".", "..", "é" * 300, "--to", "a=b", "sft", "pairs", "hf_to_flax",
    "data.json#x", "http://h/x", "9" * 30, "float8", "~", "$HOME", "*", "-", "--",
)  # fmt: skip


class Commands(Target):
    """Whole command lines without a model or data: exit code 0 or 2 and one line."""

    weight = 2.0
    num_short = 25

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        for name in _OPTIONS.keys() & main.COMMANDS.keys():
            # What a command imports is no input's fault.
            importlib.import_module(f"prism_jax.{main.COMMANDS[name][0]}")
        importlib.import_module("prism_jax.commands.serve.server")

    def make(self, rng: random.Random) -> list[str]:
        """Return the arguments of the program."""
        command = rng.choice(list(_OPTIONS))
        argv = [command] if rng.random() < 0.98 else []
        for _ in range(rng.choice((0, 1, 2, 3, 5))):
            name = rng.choice(_OPTIONS[command] or ("x",))
            value = rng.choice(_GIVEN)
            argv += rng.choice(([f"{name}={value}"], [name, value], [name]))
        return argv

    def run(self, given: list[str]) -> None:
        """Run the program in the target's empty folder."""
        output, message = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(message),
        ):
            try:
                code = main.main(given)
            except SystemExit as stop:
                code = stop.code
        require(code in (0, 2, None), f"exit code {code}: {message.getvalue()[-300:]}")
        require(code != 2 or bool(message.getvalue().strip()), "exit code 2 without a word")
