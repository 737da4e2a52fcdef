"""`curate`: prompts are chosen by how often a policy is right on them; both steps together."""

import base64
import io
import json
import pathlib

import jax
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs import curate as config_file
from prism_jax import configuration, errors, main
from prism_jax.commands.curate import main as curate_main
from prism_jax.data import prompt_files, sources
from tests import data_files, fake_teacher
from tests.stages import scripted

_NUM_ROWS, _NUM_SAMPLES = 6, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("curate")
    scripted.write_files(root, num_rows=_NUM_ROWS)
    return root


@pytest.fixture(scope="module")
def path(folder) -> pathlib.Path:
    return folder / "corpus" / "rl" / "test.parquet"


@pytest.fixture(scope="module")
def rows(path) -> list:
    return scripted.read_rows(path)


def _run(folder, path, workdir, sampler, changes=None, arg="tiny,difficulty") -> dict:
    config = config_file.get_config(arg)
    config.difficulty.policy.folder = str(folder / "policy")
    config.difficulty.prompts.path = str(path)
    config.difficulty.mesh.num_devices = 1
    config.difficulty.max_tokens = 512
    config.difficulty.num_samples = _NUM_SAMPLES
    config.difficulty.batch_responses = 2 * _NUM_SAMPLES
    config.difficulty.judge.num_workers = 1
    config.update_from_flattened_dict(changes or {})
    return curate_main.run(config, str(workdir), open_sampler=sampler.open)


def _sampler(folder, rows, script, **options) -> scripted.ScriptedSampler:
    return scripted.ScriptedSampler(folder / "policy", rows, script, **options)


def _wrong(row) -> str:
    return row.teacher_response.replace(f"<answer>\n{row.ground_truth}\n", "<answer>\n1234567\n")


def _so_often(rows, counts):
    """Return a script: of the responses to the i-th prompt the first counts[i] are right."""
    ids = [row.id for row in rows]

    def script(row, number, key):
        del key
        is_right = number < counts[ids.index(row.id)]
        return (row.teacher_response if is_right else _wrong(row)), True

    return script


def _read(path) -> list:
    return data_files.read_all(sources.Source(kind="prompts", path=str(path)))[0]


def _ids(path) -> list[str]:
    # An empty set has a file all the same, which no stage would open.
    return pq.read_table(path, columns=["id"])["id"].to_pylist()


_COUNTS = (0, 1, 4, 2, 0, 3)


def test_rl_gets_what_is_sometimes_right_and_the_teacher_what_never_is(
    folder, path, rows, tmp_path
):
    sampler = _sampler(folder, rows, _so_often(rows, _COUNTS))
    summary = _run(folder, path, tmp_path, sampler)["difficulty"]
    ids = [row.id for row in rows]
    sets = {name: _read(tmp_path / "difficulty" / f"{name}.parquet") for name in ("rl", "hard")}
    assert [row.id for row in sets["rl"]] == [ids[1], ids[3], ids[5]]
    assert [row.id for row in sets["hard"]] == [ids[0], ids[4]]
    rates = [row.extra_info["pass_rate"] for row in sets["rl"]]
    assert rates == [1 / 4, 2 / 4, 3 / 4]
    for row in (*sets["rl"], *sets["hard"]):
        given = rows[ids.index(row.id)]
        assert row.extra_info["pass_rate_samples"] == _NUM_SAMPLES
        assert given.extra_info.items() <= row.extra_info.items()
        for name in ("prompt", "ground_truth", "equivalent_answers", "data_source", "teacher_cot"):
            assert row.__getattribute__(name) == given.__getattribute__(name)
        assert row.images[0].data == given.images[0].data
    assert summary["prompts_by_pass_rate"] == {"0": 2, "0.25": 1, "0.5": 1, "0.75": 1, "1": 1}
    assert (summary["never_right"], summary["always_right"]) == (2, 1)
    assert summary["pass_rate"] == pytest.approx(10 / 24)
    assert summary["reasons"] | {"correct": 10, "wrong": 14} == summary["reasons"]
    assert json.loads((tmp_path / "difficulty" / "summary.json").read_text()) == summary


def test_a_response_that_is_cut_or_malformed_is_not_right(folder, path, rows, tmp_path):
    def script(row, number, key):
        del key
        texts = (row.teacher_response, row.teacher_cot)
        return texts[number % 2], number % 2 == 1  # cut, without caption

    summary = _run(folder, path, tmp_path, _sampler(folder, rows, script))["difficulty"]
    assert summary["never_right"] == _NUM_ROWS
    assert summary["reasons"]["format"] == _NUM_ROWS * _NUM_SAMPLES


@pytest.mark.parametrize(
    ("changes", "rl", "hard"),
    [
        ({"rl_above": 0.25}, [3, 5], [0, 4]),
        ({"rl_below": 0.75}, [1, 3], [0, 4]),
        ({"rl_above": -1.0, "rl_below": 0.5}, [0, 1, 4], [0, 4]),
        ({"hard_at_most": 0.25}, [1, 3, 5], [0, 1, 4]),
        ({"hard_at_most": -1.0}, [1, 3, 5], []),
    ],
)
def test_other_thresholds_choose_anew_without_asking_again(
    folder, path, rows, tmp_path, changes, rl, hard
):
    sampler = _sampler(folder, rows, _so_often(rows, _COUNTS))
    _run(folder, path, tmp_path, sampler, {"difficulty.prompts.max_rows": _NUM_ROWS})
    changes = {f"difficulty.{name}": value for name, value in changes.items()}
    for _ in range(2):
        found = _run(
            folder, path, tmp_path, sampler, {"difficulty.prompts.max_rows": _NUM_ROWS} | changes
        )
        summary = found["difficulty"]
        assert (summary["num_rl"], summary["num_hard"]) == (len(rl), len(hard))
        for name, chosen in (("rl", rl), ("hard", hard)):
            expected = [rows[i].id for i in chosen]
            assert _ids(tmp_path / "difficulty" / f"{name}.parquet") == expected
    assert sampler.num_opened == 1


def _by_chance(row, number, key):
    del number
    return (row.teacher_response if jax.random.bernoulli(key) else _wrong(row)), True


def test_a_killed_job_chooses_what_an_uninterrupted_one_does(folder, path, rows, tmp_path):
    whole = _sampler(folder, rows, _by_chance)
    expected = _run(folder, path, tmp_path / "whole", whole)
    killed = _sampler(folder, rows, _by_chance, num_batches=2)
    with pytest.raises(scripted.Interrupted):
        _run(folder, path, tmp_path / "killed", killed)
    assert not (tmp_path / "killed" / "difficulty" / "rl.parquet").exists()
    rest = _sampler(folder, rows, _by_chance)
    assert _run(folder, path, tmp_path / "killed", rest) == expected
    assert (len(whole.batches), len(rest.batches)) == (3, 1)
    for name in ("rates.jsonl", "rl.parquet", "hard.parquet"):
        first, second = ((tmp_path / w / "difficulty" / name) for w in ("whole", "killed"))
        assert first.read_bytes() == second.read_bytes()


def test_another_seed_is_another_job(folder, path, rows, tmp_path):
    sampler = _sampler(folder, rows, _by_chance)
    _run(folder, path, tmp_path, sampler)
    with pytest.raises(errors.InputError, match=r"config\.seed"):
        _run(folder, path, tmp_path, sampler, {"difficulty.seed": 1})


def _teacher(server) -> dict:
    endpoint = {"base_url": server.base_url, "model": fake_teacher.MODEL, "api_key_env": ""}
    changes = {f"teacher.endpoint.{name}": value for name, value in endpoint.items()}
    return changes | {"teacher.judge.num_workers": 1}


def test_both_steps_together_have_the_teacher_answer_what_is_never_right(
    folder, path, rows, tmp_path
):
    shown = {base64.b64encode(row.images[0].data).decode(): row for row in rows}
    sampler = _sampler(folder, rows, _so_often(rows, _COUNTS))

    def script(asked):
        url = asked.body["messages"][1]["content"][0]["image_url"]["url"]
        return fake_teacher.say(shown[url.partition(",")[2]].teacher_response)

    with fake_teacher.serve(script) as server:
        found = _run(folder, path, tmp_path, sampler, _teacher(server), arg="tiny")
        assert found["teacher"]["num_kept"] == 2
        assert len(server.asked) == 2
        _run(folder, path, tmp_path, sampler, _teacher(server), arg="tiny")
        assert (len(server.asked), sampler.num_opened) == (2, 1)
    kept = _read(tmp_path / "teacher" / "align.parquet")
    assert [row.id for row in kept] == [rows[0].id, rows[4].id]
    assert [row.extra_info["pass_rate"] for row in kept] == [0.0, 0.0]
    assert [row.teacher_cot for row in kept] == [rows[0].teacher_cot, rows[4].teacher_cot]


def test_nothing_is_asked_of_the_teacher_when_nothing_is_hard(folder, path, rows, tmp_path):
    sampler = _sampler(folder, rows, _so_often(rows, (1,) * _NUM_ROWS))
    with fake_teacher.serve(fake_teacher.right) as server:
        found = _run(folder, path, tmp_path, sampler, _teacher(server), arg="tiny")
        assert server.asked == []
    assert set(found) == {"difficulty"}


@pytest.mark.parametrize("size", ["tiny", "demo", "small", "4b", "8b"])
@pytest.mark.parametrize("option", ["", ",difficulty", ",teacher"])
def test_every_configuration_is_whole(size, option):
    config = config_file.get_config(size + option)
    if config.difficulty is not None:
        config.difficulty.policy.folder = config.difficulty.prompts.path = "here"
    if config.teacher is not None:
        config.teacher.endpoint.base_url = "https://api.example.com/v1"
        config.teacher.endpoint.model = "teacher"
        if config.difficulty is None:
            config.teacher.prompts.path = "here"
    options = configuration.parse(curate_main.Config, config)
    assert (options.difficulty is None) == (option == ",teacher")
    assert (options.teacher is None) == (option == ",difficulty")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"difficulty.rl_below": 0.0}, "rl_above"),
        ({"difficulty.sampling.temperature": 0.0}, "num_samples"),
        ({"difficulty.num_samples": 0}, "num_samples"),
        ({"difficulty.judge.num_workers": 0}, "num_workers"),
        ({"difficulty.policy.step": 3}, "policy.step = 3"),
        ({"difficulty.prompts.max_prompt_tokens": 1}, "prompts.max_bad_rows is 0"),
        ({"difficulty.prompts.min_pixels": 10**9}, "prompts.min_pixels"),
        ({"difficulty.mesh.num_devices": 99}, "mesh.num_devices = 99"),
    ],
)
def test_wrong_values_are_named(folder, path, rows, tmp_path, changes, told):
    sampler = _sampler(folder, rows, _by_chance)
    with pytest.raises(errors.InputError, match=rf"config\.difficulty\..*{told}"):
        _run(folder, path, tmp_path, sampler, changes)


def test_the_command_tells_a_wrong_endpoint_in_one_line_without_its_secret(
    path, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TEACHER_API_KEY", "sk-secret-0123456789")
    command = ["curate", "--config=configs/curate.py:tiny,teacher", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.teacher.prompts.path={path}", "--config.teacher.endpoint.model=m"]
    for base_url in ("https://me:sk-secret-0123456789@api.example.com", "http://api.example.com"):
        url = f"--config.teacher.endpoint.base_url={base_url}"
        assert main.main([*command, url]) == 2
        err = capsys.readouterr().err
        assert "config.teacher.endpoint.base_url must" in err
        assert "sk-secret" not in err
        assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_extra_info_keeps_its_types_and_what_has_none_in_common_is_json_text(rows, tmp_path):
    infos = [
        {"index": 1, "level": 1, "tags": ["a"], "mixed": 1, "empty": {}, "none": None},
        {"index": 2, "level": 0.5, "tags": [], "mixed": "x", "deep": {"a": [1]}},
    ]
    count = prompt_files.write(
        tmp_path / "rows.parquet", iter(rows[:2]), infos=infos, has_scales=False, has_videos=False
    )
    first, second = _read(tmp_path / "rows.parquet")
    assert count == 2
    given = {name: value for name, value in first.extra_info.items() if value is not None}
    assert given == {"index": 1, "level": 1.0, "tags": ["a"], "mixed": "1", "empty": "{}"}
    given = {name: value for name, value in second.extra_info.items() if value is not None}
    assert given == {"index": 2, "level": 0.5, "tags": [], "mixed": "x", "deep": {"a": [1]}}
    raw = pq.read_table(tmp_path / "rows.parquet").to_pylist()[0]
    with Image.open(io.BytesIO(raw["images"][0]["bytes"])) as picture:
        assert picture.size == (rows[0].images[0].width_pixels, rows[0].images[0].height_pixels)
    assert raw["reward_model"]["style"] == "rule"
    assert raw["reward_model"]["equivalent_answers"]
