"""`evaluate`: what a policy says becomes rates with intervals, whatever interrupts the work."""

import json
import pathlib

import jax
import numpy as np
import pytest

from configs import evaluate as config_file
from prism_jax import errors, intervals, main
from prism_jax.commands import evaluate
from prism_jax.commands.ask import job as ask_job
from prism_jax.rollout import prefill
from tests import training_run
from tests.stages import scripted

_NUM_ROWS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("evaluate")
    scripted.write_files(root, num_rows=_NUM_ROWS)
    return root


@pytest.fixture(scope="module")
def path(folder) -> pathlib.Path:
    return folder / "corpus" / "rl" / "test.parquet"


@pytest.fixture(scope="module")
def rows(path) -> list:
    return scripted.read_rows(path)


def _sampler(folder, rows, script, **options) -> scripted.ScriptedSampler:
    return scripted.ScriptedSampler(folder / "policy", rows, script, **options)


def _run(folder, path, workdir, sampler, changes=None) -> dict:
    config = scripted.configure(config_file, folder, path, changes)
    return evaluate.run(config, str(workdir), open_sampler=sampler.open)


def _responses(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "responses.jsonl").open(encoding="utf-8")]


def _wrong(row) -> str:
    return row.teacher_response.replace(f"<answer>\n{row.ground_truth}\n", "<answer>\n1234567\n")


def _four_kinds(ids: list[str]):
    """Return a script: right, wrong, without caption, cut; row by row in turn."""

    def script(row, number, key):
        del number, key
        kind = ids.index(row.id) % 4
        if kind == 0:
            return row.teacher_response, True
        if kind == 1:
            return _wrong(row), True
        if kind == 2:
            return row.teacher_cot, True
        return row.teacher_response[:40], False

    return script


def test_rates_are_those_of_the_scripted_responses(folder, path, rows, tmp_path):
    ids = [row.id for row in rows]
    summary = _run(folder, path, tmp_path, _sampler(folder, rows, _four_kinds(ids)))
    told = summary["greedy"]
    # Of ten rows three are right, three wrong, two without caption, two cut.
    assert told["reasons"] | {"correct": 3, "wrong": 3, "format": 4} == told["reasons"]
    assert sum(told["reasons"].values()) == _NUM_ROWS
    assert told["accuracy"]["mean"] == 0.3
    assert told["format_valid"]["mean"] == 0.6
    assert told["cut"] == 0.2
    assert told["reward"] == pytest.approx((3 * 1.0 + 3 * 0.2) / 10)
    wilson = intervals.rate([1.0] * 3 + [0.0] * 7, num_responses=1)
    assert (told["accuracy"]["low"], told["accuracy"]["high"]) == (wilson.low, wilson.high)
    found = _responses(tmp_path)
    assert told["response_tokens"] == np.mean([one["response_tokens"] for one in found])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert "samples" not in summary


def test_each_type_of_question_has_its_own_rates(folder, path, rows, tmp_path):
    ids = [row.id for row in rows]
    summary = _run(folder, path, tmp_path, _sampler(folder, rows, _four_kinds(ids)))
    types = [row.extra_info["question_type"] for row in rows]
    by_type = summary["greedy"]["by_type"]
    assert set(by_type) == set(types)
    for name, told in by_type.items():
        right = [i % 4 == 0 for i in range(_NUM_ROWS) if types[i] == name]
        assert told["num_prompts"] == len(right)
        assert told["accuracy"]["mean"] == np.mean(right)


def test_a_line_holds_the_segments_and_why_they_earned_what_they_earned(
    folder, path, rows, tmp_path
):
    ids = [row.id for row in rows]
    _run(folder, path, tmp_path, _sampler(folder, rows, _four_kinds(ids)))
    found = _responses(tmp_path)
    assert [one["id"] for one in found] == ids
    right, _, no_caption, cut = found[:4]
    assert right["response"] == rows[0].teacher_response
    assert (right["caption"], right["cot"]) == (rows[0].teacher_caption, rows[0].teacher_cot)
    assert right["answer"] == right["ground_truth"] == rows[0].ground_truth
    assert (right["accuracy"], right["reward"], right["reason"]) == (1.0, 1.0, "correct")
    assert (right["draw"], right["response_number"], right["ended"]) == ("greedy", 0, True)
    assert (no_caption["format_ok"], no_caption["caption"], no_caption["cot"]) == (False, "", "")
    assert cut["response"] == rows[3].teacher_response[:40]
    assert (cut["ended"], cut["reward"], cut["reason"]) == (False, 0.0, "format")


def test_samples_give_their_mean_and_how_often_one_of_them_is_right(folder, path, rows, tmp_path):
    ids = [row.id for row in rows]

    def script(row, number, key):
        del key
        is_right = number < ids.index(row.id) % 3  # of three responses none, one or two
        return (row.teacher_response if is_right else _wrong(row)), True

    changes = {"num_samples": 3, "has_greedy": False}
    told = _run(folder, path, tmp_path, _sampler(folder, rows, script), changes)["samples"]
    numbers = [i % 3 for i in range(_NUM_ROWS)]
    assert told["num_responses"] == 3
    assert told["accuracy"]["mean"] == pytest.approx(sum(numbers) / 3 / _NUM_ROWS)
    assert told["any_right"]["mean"] == np.mean([n > 0 for n in numbers])
    assert [one["response_number"] for one in _responses(tmp_path)] == [0, 1, 2] * _NUM_ROWS


def _by_chance(row, number, key):
    """Return a response that follows from the random key alone."""
    del number
    return (row.teacher_response if jax.random.bernoulli(key) else _wrong(row)), True


def test_a_killed_job_goes_on_and_writes_what_an_uninterrupted_one_does(
    folder, path, rows, tmp_path
):
    changes = {"num_samples": 2, "batch_responses": 4}
    whole = _sampler(folder, rows, _by_chance)
    expected = _run(folder, path, tmp_path / "whole", whole, changes)
    killed = _sampler(folder, rows, _by_chance, num_batches=4)
    with pytest.raises(scripted.Interrupted):
        _run(folder, path, tmp_path / "killed", killed, changes)
    assert not (tmp_path / "killed" / "responses.jsonl").exists()
    assert not (tmp_path / "killed" / "summary.json").exists()
    rest = _sampler(folder, rows, _by_chance)
    assert _run(folder, path, tmp_path / "killed", rest, changes) == expected
    assert killed.batches + rest.batches == whole.batches
    first, second = ((tmp_path / w / "responses.jsonl").read_bytes() for w in ("whole", "killed"))
    assert first == second
    names = {file.name for file in (tmp_path / "killed").iterdir()}
    assert names == {"run.json", "dropped_prompts.jsonl", "responses.jsonl", "summary.json"}


def test_a_job_whose_folder_was_taken_over_writes_no_more_answers(folder, path, rows, tmp_path):
    workdir = tmp_path / "run"

    def script(row, number, key):
        if row.id == rows[4].id:  # of the second batch
            owner = json.loads((workdir / "lock.json").read_text())
            (workdir / "lock.json").write_text(json.dumps(owner | {"host": "elsewhere"}))
        return row.teacher_response, True

    with pytest.raises(errors.InputError, match="taken over by process"):
        _run(folder, path, workdir, _sampler(folder, rows, script), {"batch_responses": 4})
    assert [file.name for file in (workdir / "parts" / "greedy").iterdir()] == ["00000000.jsonl"]
    assert not (workdir / "summary.json").exists()


def test_a_finished_job_is_not_asked_again(folder, path, rows, tmp_path, capsys):
    sampler = _sampler(folder, rows, _by_chance)
    first = _run(folder, path, tmp_path, sampler)
    told = capsys.readouterr().out
    again = _run(folder, path, tmp_path, sampler)
    assert again == first
    assert capsys.readouterr().out == told
    assert sampler.num_opened == 1


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("max_tokens", 400)])
def test_a_workdir_of_another_job_is_refused_naming_what_differs(
    folder, path, rows, tmp_path, name, value
):
    sampler = _sampler(folder, rows, _by_chance)
    _run(folder, path, tmp_path, sampler, {"prompts.max_rows": 1})
    with pytest.raises(errors.InputError, match=rf"config\.{name}: .* {value} here"):
        _run(folder, path, tmp_path, sampler, {"prompts.max_rows": 1, name: value})


def test_other_data_under_the_same_name_is_refused(folder, path, rows, tmp_path):
    moved = tmp_path / "test.parquet"
    moved.write_bytes(path.read_bytes())
    sampler = _sampler(folder, rows, _by_chance)
    _run(folder, moved, tmp_path / "run", sampler)
    _run(folder, path, tmp_path / "run", sampler)  # the same rows elsewhere
    (tmp_path / "other").mkdir()
    scripted.write_files(tmp_path / "other", num_rows=_NUM_ROWS - 1)
    moved.write_bytes((tmp_path / "other" / "corpus" / "rl" / "test.parquet").read_bytes())
    with pytest.raises(errors.InputError, match=r"rows of config\.prompts\.path"):
        _run(folder, moved, tmp_path / "run", sampler)


def test_the_last_batch_is_filled_up_and_its_copies_are_not_counted(folder, path, rows, tmp_path):
    sampler = _sampler(folder, rows, _by_chance)
    summary = _run(folder, path, tmp_path, sampler, {"prompts.max_rows": 5, "batch_responses": 3})
    ids = [row.id for row in rows]
    assert sampler.batches == [ids[:3], [*ids[3:5], ids[4]]]
    assert summary["greedy"]["num_prompts"] == 5


def test_the_command_evaluates_a_run_with_the_engine_in_one_shape(folder, path, tmp_path, capsys):
    run = training_run.write(
        tmp_path / "run", models={"": folder / "policy"}, steps=(0,), finished=False
    )
    command = ["evaluate", "--config=configs/evaluate.py:tiny", f"--workdir={tmp_path / 'job'}"]
    command += [f"--config.policy.folder={run}", f"--config.prompts.path={path}"]
    command += ["--config.mesh.num_devices=1", "--config.prompts.max_rows=5"]
    before = prefill.fill._cache_size()
    assert main.main([*command, "--config.batch_responses=2"]) == 0
    # Three batches, the last one filled up.
    assert prefill.fill._cache_size() <= before + 2
    out, err = capsys.readouterr()
    # A model of random weights says nothing that has the format.
    assert out.startswith("greedy: accuracy 0.0 % [0.0, 43.4], format valid 0.0 %")
    assert out.endswith("16 tokens, 100.0 % cut, 5 prompts x 1\n")
    assert f"greedy [{'#' * 24}] 3/3" in err
    assert [one["response_tokens"] for one in _responses(tmp_path / "job")] == [16] * 5


def test_a_job_on_a_growing_run_stays_with_the_step_it_began_with(folder, path, rows, tmp_path):
    models = {"": folder / "policy"}
    training_run.write(tmp_path / "run", models=models, steps=(1,), finished=False)
    changes = {"policy.folder": str(tmp_path / "run"), "batch_responses": 5}
    killed = _sampler(folder, rows, _by_chance, num_batches=1)
    with pytest.raises(scripted.Interrupted):
        _run(folder, path, tmp_path / "job", killed, changes)
    training_run.write(tmp_path / "run2", models=models, steps=(1, 2), finished=False)
    (tmp_path / "run2" / "checkpoints" / "2").rename(tmp_path / "run" / "checkpoints" / "2")
    steps = []

    def opened(source, policy, devices):
        steps.append(source.step)
        return _sampler(folder, rows, _by_chance).open(source, policy, devices)

    config = scripted.configure(config_file, folder, path, changes)
    summary = evaluate.run(config, str(tmp_path / "job"), open_sampler=opened)
    assert steps == [1]
    assert summary["policy"]["step"] == 1
    evaluate.run(config, str(tmp_path / "new"), open_sampler=opened)
    assert steps == [1, 2]
    training_run.name_best(tmp_path / "run", 1)
    config.policy.step = "best"
    evaluate.run(config, str(tmp_path / "best"), open_sampler=opened)
    assert steps == [1, 2, 1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"policy.folder": ""}, r"config\.policy\.folder must not be empty"),
        ({"policy.folder": "nowhere"}, "nowhere"),
        ({"policy.step": 3}, "not the workdir"),
        ({"policy.attention": "splash"}, r"config\.policy\.attention = 'splash' needs a TPU"),
        ({"prompts.path": "nowhere.parquet"}, "nowhere"),
        ({"prompts.max_prompt_tokens": 8}, "the limit is 8"),
        ({"has_greedy": False}, "num_samples"),
        ({"sampling.top_p": 2.0}, r"config\.sampling\.top_p"),
        ({"prompts.min_pixels": 10**9}, "min_pixels"),
    ],
)
def test_a_wrong_configuration_is_refused_before_the_policy_is_loaded(
    folder, path, tmp_path, changes, told
):
    config = scripted.configure(config_file, folder, path, changes)
    with pytest.raises(errors.InputError, match=told):
        evaluate.run(config, str(tmp_path), open_sampler=ask_job.open_sampler)
