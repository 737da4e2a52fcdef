"""Every stage in several processes: the run of one process, whatever happens to one of them."""

import json

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
    return rl_run.write(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    return sft_run.write(tmp_path_factory.mktemp("demonstrations"), num_rows=8)


def _assert_same_run(workdir, other):
    rows, expected = rl_run.rows(workdir), rl_run.rows(other)
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        for name, value in wanted.items():
            # Four partial sums are added in another order.
            assert row[name] == pytest.approx(value, rel=2e-4, abs=2e-5), (row["step"], name)


_SFT = (
    "--config.train.num_steps=4",
    "--config.train.step_rows=4",
    "--config.train.num_rows=4",
    "--config.data.row_examples=1",
    "--config.optim.warmup_fraction=None",
    "--config.optim.warmup_steps=0",
    "--config.checkpoint.save_every_steps=2",
)


@pytest.fixture(scope="module")
def undisturbed(demonstrations, tmp_path_factory):
    """Return the folder of four steps of one process."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert sft_run.run(demonstrations, workdir, *_SFT, *_ALONE) == 0
    return workdir


@pytest.mark.slow
def test_a_process_killed_in_a_save_costs_nothing_but_its_steps(
    demonstrations, undisturbed, cache, tmp_path
):
    arguments = sft_run.arguments(demonstrations, tmp_path, *_SFT, *_SHARED)
    # In the second save; the first stays.
    done = pods.run(2, arguments, cache=cache, fault="die_in_save:1:4")
    assert pods.codes(done) == {0: 134, 1: 137}, done.stdout + done.stderr
    done = pods.run(4, arguments, cache=cache, devices=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after step 2" in done.stdout
    _assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_one_step_of_all(demonstrations, undisturbed, cache, tmp_path):
    arguments = sft_run.arguments(demonstrations, tmp_path, *_SFT, *_SHARED)
    done = pods.run(2, arguments, cache=cache, fault="sigterm:1:1", max_restarts=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert pods.codes(done) == {0: 143, 1: 143}, done.stdout + done.stderr
    assert "stopped by SIGTERM after step" in done.stdout
    _assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "pairs"])
def test_what_is_refused_for_process_0_ends_all_with_code_2(cache, tmp_path, command):
    # Before anything is read: the files need not exist.
    if command == "sft":
        count, arguments = 2, sft_run.arguments(tmp_path, tmp_path, *_SFT, *_SHARED)
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
def test_processes_that_make_different_rows_stop(demonstrations, cache, tmp_path):
    arguments = sft_run.arguments(demonstrations, tmp_path, *_SFT, *_SHARED)
    done = pods.run(2, arguments, cache=cache, fault="other_rows:1:2")
    assert pods.codes(done) == {0: 1, 1: 1}, done.stdout + done.stderr
    assert "step 3: the processes of this job made different rows" in done.stdout
    assert len(rl_run.rows(tmp_path)) == 2


_STAGES = {
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
    first, *others = rl_run.arguments(stage, files, workdir, *_STAGES[stage], *overrides)
    # A later configuration replaces the one before it.
    *_, config = [one for one in others if one.startswith("--config=")]
    return [first, config, *(one for one in others if not one.startswith("--config="))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fault"),
    [("warmup", None), ("align", "late_judge:1"), ("rlvr", "slow_judge:1")],
)
def test_two_processes_take_the_steps_of_one(files, cache, tmp_path, stage, fault):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone_arguments = _arguments(stage, files, alone, *_ALONE)
    assert rl_run.run_arguments(alone_arguments) == 0
    arguments = _arguments(stage, files, shared, *_SHARED)
    done = pods.run(2, arguments, cache=cache, fault=fault)
    assert done.returncode == 0, done.stdout + done.stderr
    _assert_same_run(shared, alone)
    if stage == "rlvr":
        texts = [
            [json.loads(line)["text"] for line in (one / "rollouts" / "00000002.jsonl").open()]
            for one in (shared, alone)
        ]
        assert texts[0] == texts[1]
        assert len(set(texts[0])) > 4


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
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    done = pods.run(
        count,
        _ask(command, questions, shared, **{"mesh.num_devices": None}),
        cache=cache,
        devices=4 // count,
        fault=fault,
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
    # One process must not read a program that the others compile.
    assert not list(cache.glob("jit_*"))
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
