"""Runs whose folder is on gs://, by a real emulator behind a proxy that fails and throttles."""

import concurrent.futures
import dataclasses
import json
import os
import signal

import pytest
from etils import epath

from prism_jax import errors, main
from prism_jax.checkpoints import checkpoint, lock, mirror, objects
from prism_jax.running import metric_writers
from tests import gcs
from tests.stages import sft_run


@pytest.fixture(scope="module")
def store():
    with gcs.served(period=11) as (proxy, variables), pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield proxy


def _address(name: str) -> str:
    return f"gs://{gcs.BUCKET}/{name}"


def test_an_object_is_written_only_in_place_of_the_version_that_was_read(store):
    path = epath.Path(_address("objects/one"))
    assert objects.read(path) == (b"", 0)
    objects.write(path, b"first", replaced=0)
    content, version = objects.read(path)
    assert content == b"first"
    with pytest.raises(FileExistsError, match="was written meanwhile"):
        objects.write(path, b"second", replaced=0)
    objects.write(path, b"second", replaced=version)
    with pytest.raises(FileExistsError, match="was written meanwhile"):
        objects.write(path, b"third", replaced=version)
    assert objects.read(path)[0] == b"second"
    # As after a first try whose answer was lost.
    objects.write(path, b"second", replaced=version)


def test_of_several_jobs_one_gets_a_folder_and_one_a_dead_lock(store):
    address = _address("locked")
    with lock.hold(address, beat_seconds=0.2):
        path = epath.Path(address) / lock.NAME
        own = lock._read(path)
        with pytest.raises(errors.InputError, match=r"is in use by process"):
            lock._take(path, dataclasses.replace(own, pid=1, ticks="1"), 0.2)
        lock.check()
    # The lock of a host that is gone: nobody raises its beat.
    objects.write(path, lock._content(dataclasses.replace(own, machine="another")), replaced=0)
    jobs = [dataclasses.replace(own, since=f"job {number}") for number in range(3)]

    def take(job: lock.Owner) -> str:
        try:
            lock._take(path, job, 0.2)
        except errors.InputError as error:
            return str(error)
        return "taken"

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        told = list(pool.map(take, jobs))
    assert told.count("taken") == 1, told
    assert lock._read(path).since == jobs[told.index("taken")].since


def test_small_files_are_uploaded_whole_and_taken_away(store):
    address = _address("small")
    with mirror.opened(address, has_files=True) as folder:
        (folder / "metrics.jsonl").write_text("1\n")
        (folder / "parts").mkdir()
        (folder / "parts" / "0.jsonl").write_text("a\n")
        (folder / "half.partial").write_text("x")
        mirror.upload()
        assert (epath.Path(address) / "parts" / "0.jsonl").read_text() == "a\n"
        assert mirror.address(folder / "parts") == f"{address}/parts"
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("2\n")
        (folder / "parts" / "0.jsonl").unlink()
    assert not folder.exists()
    with mirror.opened(address, has_files=True) as folder:
        files = {path.name: path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert files == {"metrics.jsonl": "1\n2\n"}


_STEPS = (
    "--config.train.num_steps=4",
    "--config.train.step_rows=1",
    "--config.train.num_rows=1",
    "--config.data.row_examples=2",
    "--config.checkpoint.save_every_steps=3",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return sft_run.write(tmp_path_factory.mktemp("files"), num_rows=4)


@pytest.mark.slow
def test_a_run_on_gs_goes_on_as_in_a_folder_and_is_read_from_there(
    store, files, tmp_path, capsys, monkeypatch
):
    data, address = _address("data"), _address("run")
    build = ["data", "build", "--kind=sft", f"--from={files / 'train.json'}", f"--to={data}"]
    assert main.main(build) == 0
    overrides = (*_STEPS, f"--config.data.cache_dir={tmp_path / 'cache'}")
    overrides += (f"--config.data.train={data}",)
    assert sft_run.run(files, tmp_path / "local", *overrides) == 0
    write = metric_writers.JsonLines.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        # It is read while the second step runs, which is then saved though no save is due.
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metric_writers.JsonLines, "write", write_and_stop)
        assert sft_run.run(files, address, *overrides) == 143
    assert sft_run.run(files, address, *overrides) == 0
    assert f"continuing {address} after step 2" in capsys.readouterr().err
    remote = epath.Path(address)
    lines = (remote / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(x).items() if "time/" not in k} for x in lines]
    assert rows == sft_run.rows(tmp_path / "local")
    saved = checkpoint.read_meta(address, step=None)["leaves"]
    assert saved == sft_run.checksums(tmp_path / "local")
    assert json.loads((remote / "finished.json").read_text())["step"] == 4
    assert objects.read(remote / lock.NAME)[1] == 0
    # The next stage reads the model from there.
    start = (f"--config.model.folder={address}", "--config.train.num_steps=1")
    assert sft_run.run(files, tmp_path / "next", *overrides, *start, is_new=False) == 0
    # What the store will not take is one line, and loses nothing.
    store.is_down = True
    try:
        capsys.readouterr()
        changes = ("--config.train.num_steps=6", "--config.resume.allow_mismatch=True")
        code = sft_run.run(files, address, *overrides, *changes)
    finally:
        store.is_down = False
    assert code in (1, 2), code
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert checkpoint.read_meta(address, step=None)["leaves"] == saved
    assert store.num_failed > 20
