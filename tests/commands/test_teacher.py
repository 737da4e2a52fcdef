"""`curate`, second step: what a teacher says becomes data when it verifies; nothing costs twice."""

import base64
import collections
import json
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from configs import curate as config_file
from prism_jax import configuration, errors
from prism_jax.commands.curate import main as curate_main
from prism_jax.data import prompts, sources
from tests import data_files, fake_teacher

_KEY = "sk-secret/0123456789+abcdef"
_VARIABLE = "PRISM_TEST_TEACHER_KEY"
_NUM_ROWS = 6


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv(_VARIABLE, _KEY)


def _rows(num_rows: int = _NUM_ROWS) -> list[dict]:
    rows = []
    for i in range(num_rows):
        row = data_files.prompt_row(i, id=f"row-{i}")
        rows.append({k: v for k, v in row.items() if not k.startswith("teacher_")})
    return rows


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("teacher")
    return data_files.write_parquet(root / "hard.parquet", _rows(), group_rows=4)


def _config(server, path, changes=None):
    config = config_file.get_config("tiny,teacher")
    config.teacher.prompts.path = str(path)
    config.update_from_flattened_dict(
        {
            f"teacher.{name}": value
            for name, value in {
                "endpoint.base_url": server.base_url,
                "endpoint.model": fake_teacher.MODEL,
                "endpoint.api_key_env": _VARIABLE,
                "endpoint.num_concurrent": 3,
                "endpoint.max_attempts": 2,
                "endpoint.backoff_seconds": 0.01,
                "judge.num_workers": 1,
                "prices.input_million": 1.0,
                "prices.output_million": 10.0,
                **(changes or {}),
            }.items()
        }
    )
    return config


def _run(server, path, workdir, changes=None) -> dict:
    config = _config(server, path, changes)
    return curate_main.run(config, str(workdir), open_sampler=None)["teacher"]


def _read(workdir) -> tuple[list, list]:
    """Return the rows of both data sets."""
    folder = workdir / "teacher"
    found = []
    for kind, name in (("sft", "teacher_sft.json"), ("prompts", "align.parquet")):
        source = sources.Source(kind=kind, path=str(folder / name))
        rules = {"need_teacher": True, "need_answer": True} if kind == "prompts" else {}
        found.append(data_files.read_all(source, **rules)[0])
    return tuple(found)


def _report(workdir) -> dict:
    return json.loads((workdir / "teacher" / "report.json").read_text())


def _outcomes(workdir) -> dict[str, str]:
    lines = (workdir / "teacher" / "outcomes.jsonl").read_text().splitlines()
    return {line["id"]: line["outcome"] for line in map(json.loads, lines)}


def _script(**actions):
    """Return a script by question (`q3=…`): one action, or one for each request about it."""

    def script(asked):
        found = actions.get(f"q{asked.question}", fake_teacher.right(asked))
        return found[asked.number] if isinstance(found, tuple) else found

    return script


def test_both_data_sets_are_read_back_by_the_training_stages(path, tmp_path):
    with fake_teacher.serve(fake_teacher.right) as server:
        report = _run(server, path, tmp_path)
    demonstrations, rows = _read(tmp_path)
    assert len(demonstrations) == len(rows) == report["num_kept"] == _NUM_ROWS
    assert report["complete"]
    for i, (shown, row) in enumerate(zip(demonstrations, rows, strict=True)):
        text = fake_teacher.response(i)
        assert shown.id == row.id == f"row-{i}"
        roles = [turn.role for turn in shown.messages]
        assert roles == ["system", "user", "assistant"]
        assert shown.messages[0].content == prompts.SYSTEM_PROMPT
        assert shown.messages[:2] == row.prompt
        assert shown.messages[2].content == row.teacher_response == text
        assert row.teacher_caption + row.teacher_cot == text
        assert row.teacher_caption.endswith("</caption>")
        assert row.ground_truth == str(i)
        assert row.equivalent_answers == (f"{i}.0",)
        assert row.data_source == "mm_gad"
        told = {"index": i, "teacher_model": fake_teacher.MODEL, "teacher_tries": 1}
        assert told.items() <= row.extra_info.items()
        assert row.images[0].data == shown.images[0].data == data_files.png(i)
    entry = sources.Source(
        kind="sft", path=str(tmp_path / "teacher" / "dataset_info.json"), entry="teacher_sft"
    )
    assert len(data_files.read_all(entry)[0]) == _NUM_ROWS
    assert report["prompts_under_another_system_turn"] == _NUM_ROWS  # theirs is "Answer."


def test_the_teacher_sees_the_format_the_instruction_and_the_picture(path, tmp_path):
    with fake_teacher.serve(fake_teacher.right) as server:
        _run(server, path, tmp_path, {"max_rows": 1, "instruction": "Be thorough."})
        (asked,) = server.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.headers["Authorization"] == f"Bearer {_KEY}"
    system, user = asked.body["messages"]
    assert system == {"role": "system", "content": prompts.SYSTEM_PROMPT + "\nBe thorough.\n"}
    picture, text = user["content"]
    assert text == {"type": "text", "text": "What number 0?"}
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == data_files.png(0)
    rest = {name: value for name, value in asked.body.items() if name != "messages"}
    assert rest == {"model": fake_teacher.MODEL, "max_tokens": 8192, "temperature": 1.0}


_TEXT = fake_teacher.response
_REJECTED = {
    "wrong": fake_teacher.say(_TEXT(77)),
    "format": fake_teacher.say("Sure! " + _TEXT(1)),
    "cut": fake_teacher.say(_TEXT(1), finish="length"),
    "filtered": fake_teacher.say(None, finish="content_filter"),
    "unreadable": fake_teacher.say(_TEXT(1, think="<|im_end|>")),
    "too_long": fake_teacher.say(_TEXT("1" * 5000)),
    "refused": fake_teacher.error(400, "this picture is refused"),
    "failed": fake_teacher.error(500, "oops"),
}


@pytest.mark.parametrize("name", _REJECTED)
def test_only_what_verifies_is_kept_and_the_rest_is_counted_by_reason(path, tmp_path, name):
    with fake_teacher.serve(_script(q1=_REJECTED[name])) as server:
        report = _run(server, path, tmp_path, {"num_tries": 1, "max_rows": 2})
    assert report["prompts"] == dict.fromkeys(report["prompts"], 0) | {"kept": 1, name: 1}
    assert report["tries"] == report["prompts"]
    assert report["complete"] == (name != "failed")
    assert _outcomes(tmp_path) == {"row-0": "kept", "row-1": name}
    demonstrations, rows = _read(tmp_path)
    assert [row.id for row in demonstrations] == [row.id for row in rows] == ["row-0"]


def test_a_picture_in_the_response_or_half_a_character_is_unreadable(path, tmp_path):
    half = json.dumps(fake_teacher.completion(_TEXT(1, think="@"))).replace("@", "\\ud800")
    script = _script(
        q0=fake_teacher.say(_TEXT(0, caption="<image>")), q1=fake_teacher.send(200, half.encode())
    )
    with fake_teacher.serve(script) as server:
        report = _run(server, path, tmp_path, {"num_tries": 1, "max_rows": 3})
    assert (report["prompts"]["unreadable"], report["num_kept"]) == (2, 1)


def test_another_try_is_made_until_a_reply_verifies(path, tmp_path):
    wrong = fake_teacher.say(_TEXT(77))
    script = _script(
        q0=(wrong, fake_teacher.say(_TEXT(0))),
        q1=(wrong, wrong, wrong),
        q2=(fake_teacher.say("no tags"), fake_teacher.say(_TEXT(2)), wrong),
    )
    with fake_teacher.serve(script) as server:
        report = _run(server, path, tmp_path, {"num_tries": 3})
        asked = collections.Counter(one.question for one in server.asked)
    assert asked == {0: 2, 1: 3, 2: 2, 3: 1, 4: 1, 5: 1}
    assert (report["num_kept"], report["prompts"]["wrong"]) == (5, 1)
    tries = report["tries"]
    assert (tries["kept"], tries["wrong"], tries["format"]) == (5, 4, 1)
    _, rows = _read(tmp_path)
    assert [row.extra_info["teacher_tries"] for row in rows] == [2, 2, 1, 1, 1]


def test_started_again_only_what_failed_is_asked(path, tmp_path):
    with fake_teacher.serve(_script(q2=fake_teacher.error(503, "down"))) as server:
        first = _run(server, path, tmp_path)
        server.script = fake_teacher.right
        server.asked.clear()
        second = _run(server, path, tmp_path)
        assert [one.question for one in server.asked] == [2]
    assert (first["prompts"]["failed"], first["complete"]) == (1, False)
    assert (second["num_kept"], second["complete"]) == (_NUM_ROWS, True)
    assert second["replies_from_cache"] == _NUM_ROWS - 1
    assert second["this_start"]["replies"] == 1
    assert second["whole_cache"]["replies"] == _NUM_ROWS


def test_so_many_requests_are_under_way_as_configured_and_no_more(path, tmp_path):
    together = threading.Barrier(3)  # passed by three requests at a time; _NUM_ROWS are two rounds
    under_way, most = [], []

    def script(asked):
        under_way.append(asked)
        most.append(len(under_way))
        together.wait(timeout=10)
        under_way.remove(asked)
        return fake_teacher.right(asked)

    with fake_teacher.serve(script) as server:
        assert _run(server, path, tmp_path, {"endpoint.num_concurrent": 3})["complete"]
    assert max(most) == 3


def test_tokens_and_cost_are_summed(path, tmp_path):
    empty = fake_teacher.completion("", choices=[])
    script = _script(q0=(fake_teacher.send(200, empty), fake_teacher.say(_TEXT(0))))
    with fake_teacher.serve(script) as server:
        report = _run(server, path, tmp_path)
        again = _run(server, path, tmp_path)
    # One reply without a text was paid as well: (100 x 1 + 50 x 10) / 1e6 each.
    assert report["this_start"] == {
        "replies": 7,
        "input_tokens": 700,
        "output_tokens": 350,
        "cost": pytest.approx(7 * 6e-4),
    }
    assert again["whole_cache"] == report["whole_cache"] == report["this_start"]
    assert again["this_start"]["cost"] == 0
    assert report["attempts"] | {"reply": 6, "no_choices": 1} == report["attempts"]
    assert report["attempts"] == report["attempts_of_this_start"] == again["attempts"]
    assert not any(again["attempts_of_this_start"].values())
    assert report["models_told"] == {"fake-teacher-001": 6}


_COST, _DEAREST = 6e-4, 1e-2


@pytest.mark.parametrize("num_concurrent", [1, 4])
def test_a_budget_stops_cleanly_and_a_higher_one_goes_on(path, tmp_path, num_concurrent):
    # Three replies, and not quite room for the dearest fourth: 1000 tokens at 10 a million.
    limit = 3 * _COST + _DEAREST - _COST / 2
    changes = {"sampling.max_tokens": 1000, "endpoint.num_concurrent": num_concurrent}
    with fake_teacher.serve(fake_teacher.right) as server:
        report = _run(server, path, tmp_path, changes | {"budget": limit})
        assert report["stopped"] == "budget"
        assert report["whole_cache"]["cost"] <= limit
        assert len(server.asked) == report["num_kept"] == 3
        assert report["prompts"]["not_asked"] == 3
        assert len(_read(tmp_path)[0]) == 3
        again = _run(server, path, tmp_path, changes | {"budget": limit})
        assert (again["stopped"], len(server.asked)) == ("budget", 3)
        whole = _run(server, path, tmp_path, changes | {"budget": 1.0})
        assert (whole["stopped"], whole["complete"], len(server.asked)) == (None, True, 6)


def test_a_budget_needs_counts_and_prices(path, tmp_path):
    def script(asked):
        return fake_teacher.say(_TEXT(asked.question), usage=False)

    with fake_teacher.serve(script) as server:
        changes = {"budget": 1.0, "endpoint.num_concurrent": 1}
        with pytest.raises(errors.InputError, match="usage"):
            _run(server, path, tmp_path / "counted", changes)
        assert len(server.asked) == 1
        report = _run(server, path, tmp_path / "free")
        assert (report["num_kept"], report["replies_without_usage"]) == (_NUM_ROWS, _NUM_ROWS)
        free = {"budget": 1.0, "prices.input_million": 0.0, "prices.output_million": 0.0}
        with pytest.raises(errors.InputError, match="prices"):
            _run(server, path, tmp_path / "no_prices", free)


def test_a_prompt_with_a_video_is_a_wrong_row(tmp_path):
    frames = [{"bytes": data_files.png(shade)} for shade in (1, 2)]
    rows = [row | {"videos": None} for row in _rows(2)]
    rows[1] |= {"videos": [{"video": frames}], "images": []}
    rows[1]["prompt"] = [{"role": "user", "content": "<video>What number 1?"}]
    path = data_files.write_parquet(tmp_path / "rows.parquet", rows, group_rows=2)
    with fake_teacher.serve(lambda asked: fake_teacher.say(_TEXT(0))) as server:
        with pytest.raises(errors.InputError, match="asked about pictures, not about videos"):
            _run(server, path, tmp_path / "run")
        assert not server.asked


def test_an_endpoint_that_is_down_ends_the_job_before_every_prompt_has_failed(path, tmp_path):
    changes = {"max_failed_in_row": 2, "endpoint.num_concurrent": 1}
    with fake_teacher.serve(lambda asked: fake_teacher.reset) as server:
        with pytest.raises(errors.InputError, match="2 requests failed in a row: connection"):
            _run(server, path, tmp_path, changes)
        assert len(server.asked) == 2 * 2
    report = _report(tmp_path)
    assert (report["stopped"], report["prompts"]["failed"]) == ("failing", 2)
    assert report["prompts"]["not_asked"] == _NUM_ROWS - 2


def _misbehave(asked):
    """Repeat the key wherever an endpoint can."""
    text = _TEXT(asked.question, think=f"The key is {_KEY}.")
    kinds = {
        0: (fake_teacher.echo_key(500), fake_teacher.echo_key(429)),
        1: (fake_teacher.echo_key(400),),
        2: (fake_teacher.send(200, {"error": {"message": _KEY}}), fake_teacher.reset),
        3: (fake_teacher.send(200, _KEY.encode()), fake_teacher.send(200, _KEY.encode())),
        4: (fake_teacher.say(text, model=_KEY),),
        5: (fake_teacher.say(text, finish=_KEY),),
    }
    return kinds[asked.question][asked.number]


def test_the_key_is_in_no_file_and_no_output(path, tmp_path, capfd):
    with fake_teacher.serve(_misbehave) as server:
        report = _run(server, path, tmp_path, {"num_tries": 1})
        server.script = lambda _: fake_teacher.echo_key(401)
        with pytest.raises(errors.InputError) as caught:
            _run(server, path, tmp_path, {"num_tries": 1})
    assert report["prompts"] | {"failed": 3, "refused": 1, "kept": 2} == report["prompts"]
    told = "".join(capfd.readouterr()) + str(caught.value)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"report.json", "outcomes.jsonl", "align.parquet"} <= {file.name for file in files}
    assert any("[key]" in file.read_text() for file in files if file.suffix == ".json")
    # Also not in the form in which JSON may write it.
    for form in (_KEY, _KEY.replace("/", "\\/"), "sk-secret"):
        assert form not in told
        assert not [file for file in files if form.encode() in file.read_bytes()]


_PROGRAM = """
    import json, pathlib, sys
    import ml_collections
    from prism_jax import configuration
    from prism_jax.data import sources
    from prism_jax.commands.curate import teacher, teacher_config
    config = ml_collections.ConfigDict(json.load(open(sys.argv[1])))
    options = configuration.parse(teacher_config.Teacher, config)
    source = sources.Source(kind="prompts", path=options.prompts.path)
    teacher.run(options, source, pathlib.Path(sys.argv[2]))
"""


def test_killed_in_the_middle_it_asks_only_what_is_missing(path, tmp_path):
    many = data_files.write_parquet(tmp_path / "many.parquet", _rows(30), group_rows=8)
    workdir = tmp_path / "killed"
    processes = []

    def script(asked):
        if len(server.asked) >= 12:  # it dies with requests under way
            processes[0].kill()
            return fake_teacher.hang
        return fake_teacher.right(asked)

    with fake_teacher.serve(script) as server:
        config = _config(server, many)
        (tmp_path / "config.json").write_text(json.dumps(configuration.plain(config.teacher)))
        command = [sys.executable, "-c", textwrap.dedent(_PROGRAM)]
        command += [str(tmp_path / "config.json"), str(workdir / "teacher")]
        processes.append(subprocess.Popen(command))
        assert processes[0].wait(timeout=60) == -signal.SIGKILL
        assert not (workdir / "teacher" / "report.json").exists()
        known = len(list((workdir / "teacher" / "cache").glob("*/*.json")))
        assert 12 - 3 <= known < 12
        before = collections.Counter(asked.question for asked in server.asked)
        server.asked.clear()
        server.script = fake_teacher.right
        report = _run(server, many, workdir)
        after = collections.Counter(asked.question for asked in server.asked)
        _run(server, many, tmp_path / "whole")
    assert report["replies_from_cache"] == known
    assert report["attempts_of_this_start"]["reply"] == 30 - known
    # Of the killed start those under way may be in the cache and not counted, or counted and asked
    # again.
    num_twice = len(set(before) & set(after))
    assert 30 - 3 <= report["attempts"]["reply"] <= 30 + num_twice
    assert after.total() == 30 - known
    # Only what was under way at the kill is asked twice: at most three.
    assert num_twice == before.total() - known <= 3
    for name in ("teacher_sft.json", "align.parquet", "outcomes.jsonl"):
        whole = (tmp_path / "whole" / "teacher" / name).read_bytes()
        assert (workdir / "teacher" / name).read_bytes() == whole


def test_a_damaged_entry_of_the_cache_is_named(path, tmp_path):
    with fake_teacher.serve(fake_teacher.right) as server:
        _run(server, path, tmp_path)
        entry = next((tmp_path / "teacher" / "cache").glob("*/*.json"))
        entry.write_text(entry.read_text()[:-9])
        with pytest.raises(errors.InputError, match=entry.name):
            _run(server, path, tmp_path)


def test_a_missing_key_is_told_before_anything_is_done(path, tmp_path, monkeypatch):
    monkeypatch.delenv(_VARIABLE)
    with fake_teacher.serve(fake_teacher.right) as server:
        with pytest.raises(errors.InputError, match="not set"):
            _run(server, path, tmp_path / "run")
        assert server.asked == []
    assert not (tmp_path / "run").exists()


def test_no_key_is_sent_where_none_is_named(path, tmp_path):
    with fake_teacher.serve(fake_teacher.right) as server:
        _run(server, path, tmp_path, {"endpoint.api_key_env": "", "max_rows": 1})
        assert "Authorization" not in server.asked[0].headers
