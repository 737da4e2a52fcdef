"""Every stage in several processes: the run of one process, whatever happens to one of them."""

import json

import numpy as np
import pytest

from prism_jax.checkpoints import lock
from prism_jax.commands.ask import job as ask_job
from prism_jax.rewards import workers
from tests import faults, pods
from tests.stages import rl_run, scripted, sft_run

# Four devices in all, however many processes share them.
_SHARED = ("--config.mesh.num_devices=None",)
_ALONE = ("--config.mesh.num_devices=4",)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = rl_run.write(tmp_path_factory.mktemp("files"))
    (folder / "demonstrations").mkdir()
    sft_run.write(folder / "demonstrations", num_rows=8)
    return folder


_STAGES = {
    "sft": (
        "--config.train.num_steps=4",
        *sft_run.ON_PROCESSES,
    ),
    "warmup": (
        "--config.train.num_steps=2",
        "--config.train.num_pairs=4",
        "--config.evaluate.every_steps=2",
        "--config.honesty.every_steps=2",
        "--config.optim.warmup_fraction=0.0",
        "--config.rows.num_rows=4",
    ),
    "align": (
        "--config.train.num_steps=2",
        "--config.rollout.num_responses=4",
        "--config.rollout.max_response_tokens=12",
        "--config=configs/align.py:tiny,new,acc_gating",
        "--config.honesty.every_steps=None",
        "--config.rows.num_rows=4",
        "--config.discriminator.rows.num_rows=4",
    ),
    "rlvr": (
        "--config.train.num_steps=2",
        "--config.rollout.num_responses=4",
        "--config.rollout.max_response_tokens=12",
        "--config.rollout.dump_every_steps=2",
        "--config.reference.loss_coefficient=0.1",
        "--config.rows.num_rows=4",
    ),
}


def _arguments(stage, files, workdir, *overrides):
    if stage == "sft":
        return sft_run.arguments(files / "demonstrations", workdir, *_STAGES["sft"], *overrides)
    first, *others = rl_run.arguments(stage, files, workdir, *_STAGES[stage], *overrides)
    # A later configuration replaces the one before it.
    *_, config = [one for one in others if one.startswith("--config=")]
    return [first, config, *(one for one in others if not one.startswith("--config="))]


def _assert_equal_runs(workdir, other):
    """Compare two runs of several processes, each digit of them."""
    assert rl_run.rows(workdir) == rl_run.rows(other)
    assert sft_run.checksums(workdir) == sft_run.checksums(other)


def _assert_close_runs(workdir, alone):
    """Compare with a run of one process, which adds four partial sums in another order."""
    rows, expected = rl_run.rows(workdir), rl_run.rows(alone)
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (row["step"], name)
    items = sft_run.checksums(alone)
    assert sft_run.checksums(workdir).keys() == items.keys()
    for item in items:
        saved, wanted = sft_run.saved(workdir, item), sft_run.saved(alone, item)
        for name, array in wanted.items():
            np.testing.assert_allclose(saved[name], array, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(files, cache, tmp_path_factory):
    """Return the folder of four steps of SFT of two processes."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = pods.run(2, _arguments("sft", files, workdir, *_SHARED), cache=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fault"),
    [("sft", None), ("warmup", None), ("align", "late_judge:1"), ("rlvr", "slow_judge:1")],
)
def test_two_and_four_processes_end_alike_and_as_one(
    files, cache, undisturbed, tmp_path, stage, fault
):
    alone = tmp_path / "alone"
    assert rl_run.run_arguments(_arguments(stage, files, alone, *_ALONE)) == 0
    folders = {2: undisturbed if stage == "sft" else tmp_path / "2", 4: tmp_path / "4"}
    for count, folder in folders.items():
        if folder != undisturbed:
            arguments = _arguments(stage, files, folder, *_SHARED)
            done = pods.run(count, arguments, cache=cache, devices=4 // count, fault=fault)
            assert done.returncode == 0, done.stdout + done.stderr
    _assert_equal_runs(folders[4], folders[2])
    _assert_close_runs(folders[4], alone)
    if stage == "rlvr":
        texts = [
            [json.loads(line)["text"] for line in (one / "rollouts" / "00000002.jsonl").open()]
            for one in (*folders.values(), alone)
        ]
        assert texts[0] == texts[1] == texts[2]
        assert len(set(texts[0])) > 4


@pytest.mark.slow
def test_a_process_killed_in_a_save_costs_nothing_but_its_steps(
    files, undisturbed, cache, tmp_path
):
    arguments = _arguments("sft", files, tmp_path, *_SHARED)
    # In the second save; the first stays.
    done = pods.run(2, arguments, cache=cache, fault="die_in_save:1:4")
    assert pods.codes(done) == {0: 134, 1: 137}, done.stdout + done.stderr
    done = pods.run(4, arguments, cache=cache, devices=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after step 2" in done.stdout
    _assert_equal_runs(tmp_path, undisturbed)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_one_step_of_all(files, undisturbed, cache, tmp_path):
    arguments = _arguments("sft", files, tmp_path, *_SHARED)
    done = pods.run(2, arguments, cache=cache, fault="sigterm:1:1", max_restarts=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert pods.codes(done) == {0: 143, 1: 143}, done.stdout + done.stderr
    assert "stopped by SIGTERM after step" in done.stdout
    _assert_equal_runs(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "pairs"])
def test_what_is_refused_for_process_0_ends_all_with_code_2(cache, tmp_path, command):
    # Before anything is read: the files need not exist.
    if command == "sft":
        count, arguments = 2, _arguments("sft", tmp_path, tmp_path, *_SHARED)
    else:
        count, arguments = 4, _ask(command, tmp_path, tmp_path)
    with lock.hold(str(tmp_path), beat_seconds=5.0):
        done = pods.run(count, arguments, cache=cache, max_restarts=3)
    codes = dict.fromkeys(range(count), 2)
    assert (done.returncode, pods.codes(done)) == (2, codes), done.stdout + done.stderr
    for number in range(count):
        (line,) = [one for one in done.stdout.splitlines() if one.startswith(f"[{number}] error:")]
        assert f"{tmp_path} is in use by process" in line


@pytest.mark.slow
def test_processes_that_begin_with_a_run_and_make_different_rows_stop(
    files, undisturbed, cache, tmp_path
):
    begun = f"--config.model.folder={undisturbed}"
    arguments = sft_run.arguments(
        files / "demonstrations", tmp_path, *_STAGES["sft"], *_SHARED, begun, is_new=False
    )
    done = pods.run(2, arguments, cache=cache, fault="other_rows:1:2")
    assert pods.codes(done) == {0: 1, 1: 1}, done.stdout + done.stderr
    assert "step 3: the processes of this job made different rows" in done.stdout
    assert len(rl_run.rows(tmp_path)) == 2


@pytest.mark.slow
def test_a_judge_that_is_late_on_one_host_gives_its_responses_one_reward(files, cache, tmp_path):
    arguments = _arguments("rlvr", files, tmp_path, *_SHARED)
    groups = ("keep=reward", "generation_prompts=2", "max_generations=2", "surplus_steps=1")
    overrides = [f"--config.groups.{one}" for one in (*groups, "when_short=train")]
    done = pods.run(2, [*arguments, *overrides], cache=cache, fault="late_judge:1")
    assert done.returncode == 0, done.stdout + done.stderr
    for row in rl_run.rows(tmp_path):
        assert row["reward/reason_timeout_fraction"] == 0.5


_ASKING = {
    "evaluate": {"max_tokens": 12, "batch_responses": 4},
    "pairs": {"max_tokens": 512, "batch_responses": 12, "num_responses": 3},
    "curate": {
        "max_tokens": 512,
        "batch_responses": 16,
        "num_samples": 4,
        "hard_at_most": 0.25,
        "judge.num_workers": 1,
    },
}


def _ask(command, folder, workdir, **fields):
    """Return the arguments of a command that samples for the prompts of `scripted.write_files`."""
    is_step = command == "curate"
    fields = _ASKING[command] | fields
    fields["policy.folder"] = folder / "policy"
    fields["prompts.path"] = folder / "corpus" / "rl" / "test.parquet"
    section = "config.difficulty" if is_step else "config"
    return [
        command,
        f"--config=configs/{command}.py:tiny" + ",difficulty" * is_step,
        f"--workdir={workdir}",
        *(f"--{section}.{name}={value}" for name, value in fields.items()),
    ]


def _contents(workdir):
    """Return the files of an answer by name; `run.json` has the number of devices."""
    files = [path for path in workdir.rglob("*") if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    scripted.write_files(folder, num_rows=6)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "count", "fault"),
    [
        ("evaluate", 4, None),
        ("pairs", 2, "scripted:all"),
        ("curate", 4, "scripted:all,late_judge:1"),
    ],
)
def test_several_processes_write_the_files_of_one(
    questions, cache, tmp_path, monkeypatch, command, count, fault
):
    """On one process the responses that are judged late are those of process 1 of four."""
    alone, shared, own = tmp_path / "alone", tmp_path / "shared", tmp_path / "compiled"
    # As users do once, where one process must not read a program that the others compile.
    is_as_users_do = command == "evaluate"
    done = pods.run(
        count,
        _ask(command, questions, shared, **{"mesh.num_devices": None}),
        cache=own if is_as_users_do else cache,
        devices=4 // count,
        fault=fault,
        shares_programs=not is_as_users_do,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if fault is not None:
        monkeypatch.setattr(ask_job, "open_sampler", scripted.open_by_key)
    grade = workers.JudgePool.grade
    if command == "curate":

        def late(pool, tasks):
            rewards = grade(pool, tasks)
            return [faults.LATE if n % 4 == 1 else one for n, one in enumerate(rewards)]

        monkeypatch.setattr(workers.JudgePool, "grade", late)
    arguments = _ask(command, questions, alone, **{"mesh.num_devices": 4})
    assert rl_run.run_arguments(arguments) == 0
    assert _contents(shared) == _contents(alone)
    assert not list(own.glob("jit_*"))
    names = {path.name for path in shared.rglob("*")}
    if command == "evaluate":
        assert {"responses.jsonl", "summary.json"} <= names
    elif command == "pairs":
        counts = json.loads((shared / "summary.json").read_text())["responses"]
        assert min(counts[reason] for reason in ("kept", "cut", "format")) > 0, counts
        assert len(list((shared / "images").iterdir())) > 1
    else:
        summary = json.loads((shared / "difficulty" / "summary.json").read_text())
        assert summary["reasons"]["timeout"] == 6
        assert summary["reasons"]["correct"] > 3
        assert summary["num_rl"] > 0 < summary["num_hard"]
