"""The attempts that `curate` counts: over all starts, whatever ends one of them."""

import json
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from prism_jax import configuration, errors
from tests import data_files, fake_teacher
from tests.commands import test_teacher


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv(test_teacher._VARIABLE, test_teacher._KEY)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_attempts_behind_a_slow_prompt_are_counted_after_a_restart(sign, tmp_path):
    many = data_files.write_parquet(tmp_path / "many.parquet", test_teacher._rows(12), group_rows=4)
    processes, let_go = [], threading.Event()

    def script(asked):
        if asked.question == 0:  # the first prompt is under way all the time
            let_go.wait(20)
        elif asked.question == 8 and not let_go.is_set():
            processes[0].send_signal(sign)
            let_go.set()
        elif asked.number == 0 and not let_go.is_set():
            return fake_teacher.error(503, "busy")
        return fake_teacher.right(asked)

    with fake_teacher.serve(script) as server:
        config = test_teacher._config(server, many, {"endpoint.num_concurrent": 2})
        (tmp_path / "config.json").write_text(json.dumps(configuration.plain(config.teacher)))
        command = [sys.executable, "-c", textwrap.dedent(test_teacher._PROGRAM)]
        command += [str(tmp_path / "config.json"), str(tmp_path / "killed" / "teacher")]
        processes.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        assert processes[0].wait(timeout=60) != 0
        server.script = fake_teacher.right
        report = test_teacher._run(
            server, many, tmp_path / "killed", {"endpoint.num_concurrent": 2}
        )
    # Of the prompts 1 to 7 each was refused once, all of it before the signal.
    assert report["attempts"]["server_error"] == 7
    assert report["attempts_of_this_start"]["server_error"] == 0
    assert 12 - 2 <= report["attempts"]["reply"] <= 12


def test_a_line_of_attempts_that_a_kill_cut_off_is_removed(tmp_path):
    rows = test_teacher._rows()
    path = data_files.write_parquet(tmp_path / "hard.parquet", rows, group_rows=4)
    attempts = tmp_path / "teacher" / "attempts.jsonl"
    attempts.parent.mkdir()
    attempts.write_text('{"timeout": 2}\n{"timeout": 1, "reply": 1}\n{"rep')
    with fake_teacher.serve(fake_teacher.right) as server:
        report = test_teacher._run(server, path, tmp_path)
        again = test_teacher._run(server, path, tmp_path)
    assert report["attempts"]["timeout"] == again["attempts"]["timeout"] == 3
    assert report["attempts"]["reply"] == again["attempts"]["reply"] == 1 + test_teacher._NUM_ROWS
    attempts.write_text("[]\n")
    with (
        fake_teacher.serve(fake_teacher.right) as server,
        pytest.raises(errors.InputError, match=r"attempts\.jsonl: line 1: damaged"),
    ):
        test_teacher._run(server, path, tmp_path)


def test_the_step_loads_no_accelerator_library():
    program = "import sys, prism_jax.commands.curate.teacher; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
