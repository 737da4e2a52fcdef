import json
import os
import subprocess
import threading
import time

import pytest

from prism_jax import errors, lock

BEAT = 0.05


def _write(workdir, **changes):
    owner = {"host": lock.socket.gethostname(), "pid": os.getpid(), "beat": 0}
    owner |= {"started": lock._started(os.getpid())} | changes
    (workdir / "lock.json").write_text(json.dumps(owner))


def _hold(workdir):
    return lock.hold(str(workdir), beat_seconds=BEAT)


def test_a_second_job_is_refused_with_the_name_of_the_first(tmp_path):
    with _hold(tmp_path):
        with pytest.raises(errors.InputError, match=f"in use by process {os.getpid()} on"):
            with _hold(tmp_path):
                pass
        assert (tmp_path / "lock.json").exists()


def test_the_lock_is_gone_after_the_job_however_it_ended(tmp_path):
    with pytest.raises(ZeroDivisionError), _hold(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new" / "lock.json").exists()


def test_the_lock_of_a_dead_process_is_taken_over_with_a_line_in_the_log(tmp_path, caplog):
    with subprocess.Popen(["true"]) as dead:
        pass
    _write(tmp_path, pid=dead.pid)
    with _hold(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert f"from process {dead.pid}" in caplog.text


def test_a_process_that_got_the_number_of_a_dead_one_does_not_hold_its_lock(tmp_path):
    _write(tmp_path, started="2001-01-01T00:00:00+00:00")
    with _hold(tmp_path):
        pass


def test_a_job_of_another_host_holds_while_its_heart_beats(tmp_path):
    stop = threading.Event()

    def beat():
        count = 0
        while not stop.wait(BEAT / 2):
            count += 1
            _write(tmp_path, host="elsewhere", beat=count)

    _write(tmp_path, host="elsewhere")
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(errors.InputError, match="on elsewhere"), _hold(tmp_path):
            pass
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("content", [None, '{"host": "else'])
def test_a_lock_that_stands_still_is_taken_over_after_three_beats(tmp_path, content):
    _write(tmp_path, host="elsewhere")
    if content is not None:
        (tmp_path / "lock.json").write_text(content)
    begun = time.monotonic()
    with _hold(tmp_path):
        assert time.monotonic() - begun >= 3 * BEAT


def test_a_job_beats_and_does_not_remove_a_lock_that_is_no_longer_its_own(tmp_path):
    with _hold(tmp_path):
        deadline = time.monotonic() + 5
        while json.loads((tmp_path / "lock.json").read_text() or '{"beat": 0}')["beat"] < 2:
            assert time.monotonic() < deadline
            time.sleep(BEAT / 4)
        _write(tmp_path, host="elsewhere")
    assert json.loads((tmp_path / "lock.json").read_text())["host"] == "elsewhere"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(errors.InputError, match="cannot make the folder"),
        _hold(tmp_path / "file" / "run"),
    ):
        pass
