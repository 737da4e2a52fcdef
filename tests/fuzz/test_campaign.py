"""The long profile finds what it is meant to find, and an input can be run again."""

import os
import re
import subprocess
import sys


def _run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    program = [sys.executable, "-m", module, *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False, env=os.environ)


def test_every_kind_of_fault_is_found_with_its_smallest_input_and_can_be_replayed():
    done = _run("tests.fuzz.faulty", "0.07", "--only=faulty", "--seed=3")
    assert done.returncode == 1, done.stderr
    kinds = set(re.findall(r"^  #\d+ (.+?) at ", done.stdout, re.MULTILINE))
    assert kinds == {"BrokenError", "KeyError", "too slow", "dead process"}
    for shown in ("b'b'", "b'k'"):
        assert f"    {shown}\n" in done.stdout
    assert "exit code 7" in done.stdout
    number = re.search(r"#(\d+) KeyError", done.stdout)[1]
    again = _run("tests.fuzz.faulty", "1", "--only=faulty", "--seed=3", f"--number={number}")
    assert again.returncode == 1 and "KeyError: 'no such key'" in again.stderr


def test_a_target_without_faults_ends_well():
    done = _run("tests.fuzz.campaign", "0.02", "--only=waits")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^waits +\d+ inputs, 0 findings, slowest \d", done.stdout)
    assert "0 findings" in done.stdout.splitlines()[-1]
