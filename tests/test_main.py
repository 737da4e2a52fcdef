"""The program: its commands, their help, and one line with an exit code for each known error."""

import importlib
import logging
import pathlib
import re
import subprocess
import sys

import pytest

from prism_jax import errors, main
from prism_jax.checkpoints import files as checkpoint_files
from prism_jax.running import loop


def _run(*argv: object) -> int:
    return main.main([str(a) for a in argv])


def test_the_program_lists_its_commands_and_refuses_others():
    run = [sys.executable, "-m", "prism_jax"]
    told = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f"  {name} " in told for name in main.COMMANDS)
    wrong = subprocess.run([*run, "cook"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "'cook'" in wrong.stderr


def _told_by_help(capsys, command: str, flag: str = "--help") -> str:
    """Return what a command prints when it is asked, in this process, which has JAX already."""
    with pytest.raises(SystemExit) as ended:
        _run(command, flag)
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_tells_its_own_options_when_it_is_asked(capsys, command):
    told = _told_by_help(capsys, command)
    assert told.startswith(f"usage: python -m prism_jax {command} ")
    assert told == _told_by_help(capsys, command, "-h")


@pytest.mark.parametrize(
    "command", ["evaluate", "pairs", "curate", "sft", "warmup", "align", "rlvr", "pipeline"]
)
def test_help_of_a_stage_is_the_head_of_its_configuration(capsys, command):
    told = _told_by_help(capsys, command)
    # As it stands in the file: the command goes over several lines.
    _, head, _ = pathlib.Path(f"configs/{command}.py").read_text().split('"""', 2)
    assert head.strip() in told
    assert f"    python -m prism_jax {command} --config=configs/{command}.py:" in head
    assert "--config.GROUP.FIELD=VALUE" in told


def test_help_away_from_the_configurations_says_where_it_looked(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    told = _told_by_help(capsys, "sft")
    assert f"configs/sft.py, which is not in {tmp_path}" in " ".join(told.split())
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sft.py").write_text('"""My own sizes."""\n')
    assert "\nMy own sizes.\n" in _told_by_help(capsys, "sft")


@pytest.mark.parametrize("argument", ["--model=--", "--prompt=--", "--"])
def test_two_dashes_in_the_place_of_a_value_are_refused(capsys, argument):
    assert _run("generate", "--model=x", "--prompt=y", argument) == 2
    assert capsys.readouterr().err == f"error: generate: {argument} is no argument of a command\n"


def test_every_command_has_a_main():
    for module, _ in main.COMMANDS.values():
        assert callable(importlib.import_module(f"prism_jax.{module}").main)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs a file that is full")
def test_a_full_disk_is_said_in_one_line(monkeypatch, capsys):
    def fill(argv):
        del argv
        try:
            with open("/dev/full", "wb") as file:
                file.write(b"x")
        except OSError as error:
            # As a library tells it: with words of its own around the system's.
            raise ValueError("could not write the arrays") from error

    # Both are set for the rest of the process, which otherwise ends there.
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(logging.getLogger("asyncio"), "disabled", False)
    monkeypatch.setattr(importlib.import_module("prism_jax.commands.convert"), "main", fill)
    assert _run("convert") == 1
    told = capsys.readouterr().err
    assert told.startswith("error: the disk is full") and "No space left on device" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (errors.InputError("a\nb"), 2, "error: a b\n"),
        (errors.InputError("a" * 9000 + "b"), 2, f"error: {'a' * 2000} … {'a' * 1999}b\n"),
        (checkpoint_files.DamagedError("x is damaged"), 2, "error: x is damaged\n"),
        (checkpoint_files.CheckpointError("not saved:\n  y"), 1, "error: not saved: y\n"),
        (loop.DivergedError("3 in a row"), 1, "error: 3 in a row\n"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "error: /x/y: Permission denied\n"),
        (OSError(18, "Other device", "/a", None, "/b"), 2, "error: /a to /b: Other device\n"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
            1,
            "error: not enough memory; fewer or shorter rows need less: "
            "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\n",
        ),
        (
            KeyError("https://"),
            2,
            "error: a path must be local or begin with gs://, got another address: 'https://'\n",
        ),
        (
            ImportError("Install s3fs to access S3"),
            2,
            "error: a path must be local or begin with gs://, got another address: Install s3fs "
            "to access S3\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_every_known_error_is_one_line_and_its_exit_code(monkeypatch, capsys, error, code, told):
    def fail(argv):
        raise error

    # Both are set for the rest of the process, which otherwise ends there.
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(logging.getLogger("asyncio"), "disabled", False)
    monkeypatch.setattr(importlib.import_module("prism_jax.commands.convert"), "main", fail)
    assert _run("convert") == code
    assert capsys.readouterr().err == told


def test_the_readme_names_the_exit_codes_that_main_documents():
    codes = re.findall(r"^    (\d+) ", main.__doc__, re.M)
    _, table = pathlib.Path("README.md").read_text().split("| exit code |")
    assert codes == re.findall(r"^\| (\d+) \|", table.split("\n\n")[0], re.M)


def test_another_unexpected_error_keeps_its_traceback(monkeypatch):
    def fail(argv):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(importlib.import_module("prism_jax.commands.convert"), "main", fail)
    with pytest.raises(OSError, match="Input/output"):
        _run("convert")
