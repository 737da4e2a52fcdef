"""The long profile finds what it is meant to find, and an input can be run again."""

import os
import re
import subprocess
import sys

import pytest

from tests.fuzz import campaign, faulty, targets


def test_every_kind_of_fault_is_found_with_its_smallest_input_and_can_be_replayed(
    monkeypatch, capsys
):
    arguments = ["0.1", "--only=faulty,waits", "--seed=3"]
    program = [sys.executable, "-m", "tests.fuzz.faulty", *arguments]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 1, done.stderr
    kinds = set(re.findall(r"^  #\d+ (.+?) at ", done.stdout, re.MULTILINE))
    assert kinds == {"BrokenError", "KeyError", "too slow", "dead process"}
    for shown in ("b'b'", "b'k'"):
        assert f"    {shown}\n" in done.stdout
    assert "exit code 7" in done.stdout
    # The target beside it has no fault.
    assert re.search(r"^waits +\d+ inputs, 0 findings, slowest \d", done.stdout, re.MULTILINE)
    assert re.search(r" [1-9]\d* findings$", done.stdout.splitlines()[-1])
    number = re.search(r"#(\d+) KeyError", done.stdout)[1]
    monkeypatch.setitem(targets.TARGETS, "faulty", faulty.Faulty)
    with pytest.raises(KeyError, match="no such key"):
        campaign.main(["1", "--only=faulty", "--seed=3", f"--number={number}"])
    assert "k" in capsys.readouterr().out
