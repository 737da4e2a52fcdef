import errno
import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import threading
import time

import pytest

from prism_jax import errors
from prism_jax.checkpoints import lock

BEAT = 0.05


def _write(workdir, **changes):
    owner = {"host": lock.socket.gethostname(), "machine": lock._machine(), "pid": os.getpid()}
    owner |= {"ticks": lock._ticks(os.getpid()), "folder": lock._folder(workdir)}
    owner |= {"since": "2026-01-01T00:00:00+00:00", "beat": 0} | changes
    (workdir / "lock.json").write_text(json.dumps(owner))


# Another machine: its processes cannot be seen from here.
ELSEWHERE = {"host": "elsewhere", "machine": "another boot"}


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
    _write(tmp_path, ticks="1")
    with _hold(tmp_path):
        pass


def test_a_job_of_another_host_holds_while_its_heart_beats(tmp_path):
    stop = threading.Event()

    def beat():
        count = 0
        while not stop.wait(BEAT / 2):
            count += 1
            _write(tmp_path, **ELSEWHERE, beat=count)

    _write(tmp_path, **ELSEWHERE)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(errors.InputError, match="on elsewhere"), _hold(tmp_path):
            pass
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    "content",
    [
        ELSEWHERE,
        {"machine": "the boot before, of this host"},
        {"folder": "1:2"},  # copied while the job lives
        b'{"host": "else',
        b"\0\xff{",
        b"",
        b"[]",
        b'{"host": "h", "pid": true}',
    ],
)
def test_a_lock_that_stands_still_is_taken_over_after_three_beats(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "lock.json").write_bytes(content)
    else:
        _write(tmp_path, **content)
    begun = time.monotonic()
    with _hold(tmp_path):
        assert time.monotonic() - begun >= 3 * BEAT


def test_a_job_beats_and_does_not_remove_a_lock_that_is_no_longer_its_own(tmp_path):
    with _hold(tmp_path):
        deadline = time.monotonic() + 5
        while json.loads((tmp_path / "lock.json").read_text() or '{"beat": 0}')["beat"] < 2:
            assert time.monotonic() < deadline
            time.sleep(BEAT / 4)
        _write(tmp_path, **ELSEWHERE)
    assert json.loads((tmp_path / "lock.json").read_text())["host"] == "elsewhere"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(errors.InputError, match="cannot make the folder"),
        _hold(tmp_path / "file" / "run"),
    ):
        pass


def _race(folders, barrier, won):
    for number, folder in enumerate(folders):
        barrier.wait()
        try:
            with lock.hold(folder, beat_seconds=60.0):
                with won.get_lock():
                    won[number] += 1
                barrier.wait()
        except errors.InputError:
            barrier.wait()


@pytest.mark.parametrize("content", ["dead", None])
def test_of_processes_that_start_at_once_exactly_one_gets_the_folder(tmp_path, content):
    folders = [tmp_path / f"{number}" for number in range(100)]
    for folder in folders:
        folder.mkdir()
        if content is not None:
            _write(folder, ticks="1")
    context = multiprocessing.get_context("spawn")
    barrier, won = context.Barrier(3, timeout=60), context.Array("i", len(folders))
    arguments = ([str(folder) for folder in folders], barrier, won)
    racers = [context.Process(target=_race, args=arguments) for _ in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    assert list(won) == [1] * len(folders)
    assert not any(path for folder in folders for path in folder.iterdir())


def test_a_lock_that_another_job_took_first_is_not_taken_over(tmp_path, monkeypatch):
    _write(tmp_path, ticks="1")
    seen = lock._lives

    def overtaken(path, holder, own, beat_seconds):
        found = seen(path, holder, own, beat_seconds)
        _write(tmp_path)  # of this process, which lives
        return found

    monkeypatch.setattr(lock, "_lives", overtaken)
    with pytest.raises(errors.InputError, match="in use by process"), _hold(tmp_path):
        pass
    assert (tmp_path / "lock.json").exists()


def test_a_turn_whose_process_was_killed_holds_nobody_up(tmp_path):
    (tmp_path / "lock.json.turn").write_text("")
    with _hold(tmp_path):
        assert (tmp_path / "lock.json").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_flock_still_has_its_lock(tmp_path, monkeypatch, caplog):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with _hold(tmp_path):
        assert "has no flock" in caplog.text
        with pytest.raises(errors.InputError, match="in use by"), _hold(tmp_path):
            pass


def test_a_job_whose_folder_was_taken_over_is_told_by_whom_before_it_saves(tmp_path):
    lock.check()  # holds nothing
    with _hold(tmp_path):
        lock.check()
        _write(tmp_path, **ELSEWHERE, pid=17)
        with pytest.raises(errors.InputError, match="taken over by process 17 on elsewhere"):
            lock.check()
        (tmp_path / "lock.json").unlink()
        with pytest.raises(errors.InputError, match=r"lock\.json is gone"):
            lock.check()
    lock.check()


def test_a_living_job_holds_whatever_the_clock_says(tmp_path, monkeypatch):
    read_text = pathlib.Path.read_text

    def clockless(path, *args, **options):
        # The boot time in it follows the wall clock.
        assert str(path) != "/proc/stat"
        return read_text(path, *args, **options)

    monkeypatch.setattr(pathlib.Path, "read_text", clockless)
    with _hold(tmp_path):
        owner = json.loads((tmp_path / "lock.json").read_text())
        (tmp_path / "lock.json").write_text(json.dumps(owner | {"since": "another time"}))
        with pytest.raises(errors.InputError, match="in use by process"), _hold(tmp_path):
            pass
        (tmp_path / "lock.json").write_text(json.dumps(owner))


def test_a_copy_of_a_living_jobs_folder_is_a_folder_of_its_own(tmp_path):
    with _hold(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with _hold(tmp_path / "copy"):
            lock.check()
        lock.check()


def test_a_lock_of_another_version_holds_while_it_changes(tmp_path):
    stop = threading.Event()

    def beat():
        count = 0
        while not stop.wait(BEAT / 2):
            count += 1
            old = {"host": "h", "pid": 1, "started": "then", "beat": count}
            (tmp_path / "part").write_text(json.dumps(old))
            (tmp_path / "part").replace(tmp_path / "lock.json")

    (tmp_path / "lock.json").write_text("{}")
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(errors.InputError, match="in use by"), _hold(tmp_path):
            pass
    finally:
        stop.set()
        thread.join()
