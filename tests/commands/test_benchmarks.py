"""A suite of benchmarks in one command: rules, groups, a model that judges, kills in between."""

import json
import pathlib
import re
import shutil

import pytest

from configs import evaluate as config_file
from prism_jax import errors, main
from prism_jax.commands import evaluate
from prism_jax.commands.ask import job as ask_job
from prism_jax.commands.benchmarks import llm_judge, suite
from prism_jax.data.benchmarks import files
from prism_jax.rewards.benchmarks import facts as facts_lib
from tests import fake_teacher, published_benchmarks, tiny_checkpoint
from tests.stages import scripted

_CHANGES = {
    "prompts.max_prompt_tokens": 4096,
    "batch_responses": 8,
    "rewards.num_workers": 1,
}
# Judged right by the model alone.
_DISGUISED = "It is the one that I would call right"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("suite")
    tiny_checkpoint.write(root / "policy")
    for name in published_benchmarks.PUBLISHED:
        hub = published_benchmarks.write(root / "hub" / name, name)
        command = ["data", "benchmark", name, f"--from={hub}", f"--to={root / 'suite' / name}"]
        assert main.main(command) == 0
    return root


@pytest.fixture(scope="module")
def rows(folder) -> list:
    found = files.suite(str(folder / "suite"))
    return [row for path in found.values() for row in scripted.read_rows(pathlib.Path(path))]


def _judged_config(folder, server, changes=None):
    config = scripted.configure(config_file, folder, folder / "suite", _CHANGES)
    config.llm_judge = config_file.get_config("tiny,llm_judge").llm_judge
    config.llm_judge.endpoint.model = "judge"
    config.llm_judge.endpoint.base_url = server.base_url
    config.llm_judge.endpoint.max_attempts = 1
    config.llm_judge.endpoint.num_concurrent = 2
    config.update_from_flattened_dict(changes or {})
    return config


def _suite(folder, config, workdir, sampler, names=None) -> dict:
    found = files.suite(str(folder / "suite"))
    found = {name: path for name, path in found.items() if names is None or name in names}
    return suite.run(
        config,
        str(workdir),
        found,
        check=evaluate.check,
        evaluate=evaluate.run,
        open_sampler=sampler.open,
    )["benchmarks"]


def _response(answer: str) -> str:
    return f"<caption>\nx\n</caption>\n<think>\ny\n</think>\n<answer>\n{answer}\n</answer>"


def _truth(row) -> str:
    """Return the answer as a good policy writes it."""
    facts = facts_lib.read(row.extra_info, place="")
    if facts.name == "hallusion":
        return "Yes" if facts.answer == "1" else "No"
    return facts.answer


def _script(row, number, key):
    """Answer a benchmark's first row rightly in other words, the second wrongly, others rightly."""
    del number, key
    place = _PLACES[row.data_source].index(row.id)
    return _response([_DISGUISED, "12345678", _truth(row)][min(place, 2)]), True


_PLACES: dict[str, list[str]] = {}


@pytest.fixture(autouse=True)
def places(rows):
    for row in rows:
        ids = _PLACES.setdefault(row.data_source, [])
        if row.id not in ids:
            ids.append(row.id)


def _judge(asked):
    """Say that the disguised answers are right, and that nothing else is."""
    text = asked.body["messages"][0]["content"]
    is_right = _DISGUISED in text
    if "Reply with a single digit" in text:
        return fake_teacher.say("1" if is_right else "0")
    if "Reply with a single word" in text:
        return fake_teacher.say("correct" if is_right else "unclear")
    return fake_teacher.say("B" if is_right else "-")


def _mean(of, score="accuracy"):
    return (of["accuracy"] if score == "accuracy" else of["groups"][score])["mean"]


def test_a_suite_is_scored_by_rules_by_a_model_and_in_groups(folder, rows, tmp_path, capsys):
    sampler = scripted.ScriptedSampler(folder / "policy", rows, _script)
    with fake_teacher.serve(_judge) as server:
        found = _suite(folder, _judged_config(folder, server), tmp_path / "run", sampler)
        asked = [one.body["messages"][0]["content"] for one in server.asked]
    assert sampler.num_opened == 1
    assert sorted(found) == sorted(published_benchmarks.PUBLISHED)
    scores = {name: passes["greedy"]["benchmark"] for name, passes in found.items()}
    # By rules the first two rows are wrong, but that MMMU guesses and MathVista takes the nearest.
    for name in ("mathvision", "mathverse", "wemath", "hallusion", "mmmu_pro_vision"):
        count = len(_PLACES[name])
        assert _mean(scores[name]["rules"]) == max(0, count - 2) / count, name
        assert _mean(scores[name]["judged"]) == (max(0, count - 2) + 1) / count, name
    assert scores["mmmu"]["guessed"] == 0.5
    # A list is read loosely, so that the model's extraction, here none, counts in its place.
    assert _mean(scores["mathvista"]["judged"]) == 3 / 5
    # Of problem 1 the first step is right by the model alone and the second is wrong.
    rules, judged = scores["wemath"]["rules"], scores["wemath"]["judged"]
    assert (_mean(rules, "score_strict"), _mean(rules, "score_loose")) == (0.5, 0.5)
    assert (_mean(judged, "score_strict"), _mean(judged, "score_loose")) == (0.5, 1.0)
    assert rules["groups"]["score_strict"]["num_groups"] == 2
    groups = scores["hallusion"]["judged"]["groups"]
    means = {name: group["mean"] for name, group in groups.items()}
    # Figure 0 of VD has a right and a wrong answer; of VS there is no figure 0.
    assert means == {"aAcc": 0.8, "fAcc": 0.5, "qAcc": pytest.approx(2 / 3)}
    # The model sees question, answer and response, and is asked about nothing that is right.
    assert not any("option J" in text and "<answer>\nJ" in text for text in asked)
    assert any("Reference answer:\nIt is not." in text for text in asked)
    out = capsys.readouterr().out
    line = r"wemath +2 +score_loose +50\.0 % \[.*\] +100\.0 % \[.*\]"
    assert re.search(line, out), out
    assert json.loads((tmp_path / "run" / suite.FILE).read_text())["benchmarks"] == found
    page = tmp_path / "page.html"
    command = ["report", f"--workdir={tmp_path / 'run'}", f"--out={page}", "--num_examples=2"]
    assert main.main(command) == 0
    text = page.read_text()
    assert text.count('<article class="card example">') == sum(
        min(2, len(ids)) for ids in _PLACES.values()
    )
    assert "<td>score_loose</td>" in text and "<td>100.0 % [34.2, 100.0]</td>" in text
    assert "judge: right (1)" in text and "judge: right (correct)" in text
    assert "guessed, as published" in text and "Between &lt;image 1&gt;" not in text
    assert text.count("<img src=") >= 12


def test_a_killed_suite_goes_on_and_asks_neither_policy_nor_judge_twice(folder, rows, tmp_path):
    names = ("hallusion", "mmmu", "wemath")
    changes = {"batch_responses": 4}
    whole = scripted.ScriptedSampler(folder / "policy", rows, _script)
    with fake_teacher.serve(_judge) as server:
        config = _judged_config(folder, server, changes)
        expected = _suite(folder, config, tmp_path / "whole", whole, names)
        num_asked = len(server.asked)
    # Hallusion has two batches, MMMU one, We-Math two: it is killed between its two.
    first = scripted.ScriptedSampler(folder / "policy", rows, _script, num_batches=4)
    workdir = tmp_path / "killed"
    with fake_teacher.serve(_judge) as server:
        with pytest.raises(scripted.Interrupted):
            _suite(folder, _judged_config(folder, server, changes), workdir, first, names)
        counts = len(server.asked)
    rest = scripted.ScriptedSampler(folder / "policy", rows, _script)
    with fake_teacher.serve(_judge) as server:  # the judge has moved to another port
        found = _suite(folder, _judged_config(folder, server, changes), workdir, rest, names)
        counts += len(server.asked)
    assert found == expected
    assert len(rest.batches) == 1
    assert first.batches + rest.batches == whole.batches
    assert counts == num_asked
    written = {path.name for path in (workdir / "wemath").iterdir()}
    assert "parts" not in written and "summary.json" in written


def test_a_suite_with_a_prompt_that_is_too_long_is_refused_before_any_is_evaluated(
    folder, rows, tmp_path
):
    sampler = scripted.ScriptedSampler(folder / "policy", rows, _script)
    config = scripted.configure(config_file, folder, folder / "suite", _CHANGES)
    config.prompts.max_prompt_tokens = 300  # the prompts of HallusionBench have 278, others more
    with pytest.raises(errors.InputError, match=r"mathvista: .*tokens, the limit is 300"):
        _suite(folder, config, tmp_path, sampler, ("hallusion", "mathvista"))
    assert sampler.num_opened == 0
    assert list(tmp_path.iterdir()) == []


def test_a_judge_that_fails_ends_the_job_and_its_replies_are_kept(folder, rows, tmp_path):
    answered = []

    def fail_later(asked):
        answered.append(asked)
        return _judge(asked) if len(answered) <= 2 else fake_teacher.error(500, "down")

    config = scripted.configure(config_file, folder, folder / "suite" / "wemath", _CHANGES)
    sampler = scripted.ScriptedSampler(folder / "policy", rows, lambda *_: (_response("9"), True))
    with fake_teacher.serve(fail_later) as server:
        judged = _judged_config(folder, server, {"llm_judge.endpoint.num_concurrent": 1})
        config.llm_judge = judged.llm_judge
        with pytest.raises(errors.RunError, match=r"HTTP 500: down .*its replies so far are kept"):
            evaluate.run(config, str(tmp_path), open_sampler=sampler.open)
    assert len(list((tmp_path / llm_judge.CACHE).glob("*/*.json"))) == 2
    assert not (tmp_path / "responses.jsonl").exists()
    with fake_teacher.serve(_judge) as server:
        config.llm_judge.endpoint.base_url = server.base_url
        evaluate.run(config, str(tmp_path), open_sampler=sampler.open)
        assert len(server.asked) == len(_PLACES["wemath"]) - 2
    lines = [json.loads(line) for line in (tmp_path / "responses.jsonl").open()]
    assert {line["judged"]["reply"] for line in lines} == {"0"}
    assert lines[0]["benchmark"]["group"] == {"problem": "1", "key": "2steps_1"}


def test_a_response_that_the_judge_refuses_is_counted_and_is_not_right(folder, rows, tmp_path):
    config = scripted.configure(config_file, folder, folder / "suite" / "wemath", _CHANGES)
    sampler = scripted.ScriptedSampler(folder / "policy", rows, lambda *_: (_response("9"), True))
    with fake_teacher.serve(lambda asked: fake_teacher.error(400, "too long")) as server:
        config.llm_judge = _judged_config(folder, server).llm_judge
        summary = evaluate.run(config, str(tmp_path), open_sampler=sampler.open)
    judged = summary["greedy"]["benchmark"]["judged"]
    assert judged["num_asked"] == judged["num_refused"] == len(_PLACES["wemath"])
    assert judged["accuracy"]["mean"] == 0.0


def test_every_field_of_the_judge_shows_in_its_requests(folder, rows, tmp_path):
    (tmp_path / "own.txt").write_text("Own: {answer}.\n{response}")
    cases = [
        ({"endpoint.model": "another"}, lambda body: body["model"] == "another"),
        ({"sampling.max_tokens": 7}, lambda body: body["max_tokens"] == 7),
        ({"sampling.max_tokens_field": "max_completion_tokens"}, lambda b: "max_tokens" not in b),
        ({"sampling.temperature": 0.5}, lambda body: body["temperature"] == 0.5),
        ({"sampling.top_p": 0.5}, lambda body: body.get("top_p") == 0.5),
        ({"sampling.reasoning_effort": "low"}, lambda b: b.get("reasoning_effort") == "low"),
        (
            {"prompts.right": str(tmp_path / "own.txt")},
            lambda body: body["messages"][0]["content"].startswith("Own: A."),
        ),
    ]
    sampler = scripted.ScriptedSampler(folder / "policy", rows, lambda *_: (_response("9"), True))
    with fake_teacher.serve(_judge) as server:

        def body_after(number, changes):
            config = _judged_config(folder, server, {"prompts.max_rows": 1})
            config.prompts.path = str(folder / "suite" / "wemath")
            for name, value in changes.items():
                config.update_from_flattened_dict({f"llm_judge.{name}": value})
            evaluate.run(config, str(tmp_path / str(number)), open_sampler=sampler.open)
            return server.asked[-1].body

        base = body_after(-1, {})
        for number, (changes, is_seen) in enumerate(cases):
            assert not is_seen(base), changes
            assert is_seen(body_after(number, changes)), changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llm_judge.endpoint.model": ""}, r"config\.llm_judge\.endpoint\.model must not be empty"),
        ({"llm_judge.prompts.right": "none.txt"}, r"prompts\.right = none\.txt: cannot be read"),
        ({"llm_judge.endpoint.api_key_env": "NO_SUCH_KEY"}, r"that config\.llm_judge\.endpoint"),
        ({"prompts.path": "@plain"}, r"config\.llm_judge judges benchmarks, the data is of none"),
        ({"prompts.path": "@plain", "llm_judge": None, "max_tokens": None}, "max_tokens must be"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_sampled(
    folder, rows, tmp_path, changes, message
):
    (tmp_path / "plain.jsonl").write_text('{"prompt": "What?", "answer": "7"}\n')
    sampler = scripted.ScriptedSampler(folder / "policy", rows, _script)
    with fake_teacher.serve(_judge) as server:
        config = _judged_config(folder, server)
        config.prompts.path = str(folder / "suite" / "wemath")
        for name, value in changes.items():
            given = str(tmp_path / "plain.jsonl") if value == "@plain" else value
            with config.unlocked():
                config.update_from_flattened_dict({name: given})
        with pytest.raises(errors.InputError, match=message):
            evaluate.run(config, str(tmp_path / "run"), open_sampler=sampler.open)
    assert sampler.num_opened == 0


def test_the_command_evaluates_a_suite(folder, rows, tmp_path, capsys, monkeypatch):
    for name in ("mmmu_pro_vision", "mathverse"):
        shutil.copytree(folder / "suite" / name, tmp_path / "two" / name)
    sampler = scripted.ScriptedSampler(folder / "policy", rows, lambda *_: (_response("C"), True))
    monkeypatch.setattr(ask_job, "open_sampler", sampler.open)
    command = ["evaluate", "--config=configs/evaluate.py:tiny,samples,benchmarks"]
    command += [f"--workdir={tmp_path / 'run'}", f"--config.prompts.path={tmp_path / 'two'}"]
    command += [f"--config.policy.folder={folder / 'policy'}", "--config.mesh.num_devices=1"]
    assert main.main([*command, "--config.rewards.num_workers=1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"mathverse \(samples\) +2 +accuracy +0\.0 %", out), out
    line = r"mmmu_pro_vision \(greedy\) +1 +accuracy +100\.0 % \[20\.7, 100\.0\] +-"
    assert re.search(line, out), out
    # Responses are as long as the benchmark allows.
    run = json.loads((tmp_path / "run" / "mathverse" / "run.json").read_text())
    assert run["config"]["max_tokens"] is None
    assert sampler.max_tokens == {8192, 16384}
    assert sampler.num_opened == 1
