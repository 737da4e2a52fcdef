"""No dead field in `curate`'s second step: the teacher is a script behind a real address."""

import contextlib
import functools
import io
import random
import re

import pytest

from configs import curate as config_file
from prism_jax.commands.curate import main as curate_main
from prism_jax.teacher import client
from tests import fake_teacher
from tests.stages import field_tables, prompt_fields

_VARIABLE = "PRISM_TEST_TEACHER_KEY"
# Nobody is there: the port is that of a server which each probe starts.
_NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fields")
    prompt_fields.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_VARIABLE, "sk-secret-0123456789")
        yield field_tables.Seen(curate_main.Config, _configure, folder, refusing=_REFUSING)


def _configure(folder):
    config = config_file.get_config("tiny,teacher")
    own = config.teacher
    own.prompts.path = str(folder / "rows.jsonl")
    own.endpoint.base_url = f"{_NOWHERE}/v1"
    own.endpoint.model = fake_teacher.MODEL
    own.endpoint.api_key_env = ""
    own.endpoint.num_concurrent = 1
    own.endpoint.max_attempts = 3
    own.endpoint.backoff_seconds = 0.001
    own.judge.num_workers = 1
    own.prices.input_million, own.prices.output_million = 1.0, 10.0
    return config


def _run(given, script):
    """Return the report, what the endpoint was asked, and what was told on standard error."""
    told = io.StringIO()
    with fake_teacher.serve(script) as server:
        own = given.config.teacher.endpoint
        own.base_url = own.base_url.replace(_NOWHERE, f"http://127.0.0.1:{server.server_port}")
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            found = curate_main.run(given.config, str(given.workdir), open_sampler=None)
        return found["teacher"], server.asked, told.getvalue()


def _right(asked):
    del asked
    return fake_teacher.say(prompt_fields.TEXTS[0])


def _wrong_first(asked):
    return fake_teacher.say(prompt_fields.TEXTS[0 if asked.number else 2])


def _down(asked):
    del asked
    return fake_teacher.error(500, "down")


def _slow(asked):
    """Reply after a fifth of a second."""
    reply = _right(asked)

    def act(handler, asked):
        handler.server.ending.wait(0.2)
        reply(handler, asked)

    return act


def asked(given):
    """Return every request."""
    _, found, _ = _run(given, _right)
    return [(one.path, one.headers.get("Authorization"), one.body) for one in found]


def asked_from_store(given):
    """Return the same about prompts that lie in an object store."""
    with field_tables.a_store(given.folder):
        return asked(given)


def counted(given):
    """Return what becomes of prompts whose first reply is wrong, and what that costs."""
    report, _, _ = _run(given, _wrong_first)
    return {name: report[name] for name in ("prompts", "tries", "whole_cache", "stopped")}


def kept(given):
    """Return which folders there are when replies are kept."""
    _run(given, _right)
    return sorted(path.name for path in (given.workdir / "teacher").iterdir() if path.is_dir())


def failed(given):
    """Return how attempts at an endpoint end that is down."""
    return _run(given, _down)[0]["attempts"]


def late(given):
    """Return how attempts at a slow endpoint end."""
    return _run(given, _slow)[0]["attempts"]


def waits(given):
    """Return the seconds between attempts at an endpoint that is down; nobody waits for them."""
    found = []

    class Stop:
        def __init__(self, stop):
            self._stop = stop

        def wait(self, seconds):
            found.append(seconds)
            return self._stop.is_set()

    real, random_of = client.Client, random.Random
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "Random", lambda: random_of(0))
        patch.setattr(
            client, "Client", lambda *a, stop, **options: real(*a, stop=Stop(stop), **options)
        )
        _run(given, _down)
    return found


def num_lines(given):
    """Return how many lines of progress are told."""
    return len(re.findall(r"^teacher \[", _run(given, _right)[2], re.MULTILINE))


def judged(given):
    """Return what the judge says of four responses, and the processes that are started."""
    return field_tables.judged(
        functools.partial(given.options.teacher.judge.start_for_accuracy, "strict"),
        prompt_fields.TASKS,
    )


def _each(changes, before=None):
    start = field_tables.at("teacher.", before or {})
    return field_tables.each(field_tables.at("teacher.", changes), before=start)


_TABLE = {
    asked: _each(
        {
            "prompts.path": "@few.jsonl",
            "prompts.image_root": "@elsewhere",
            "max_rows": 2,
            "limit_image_pixels": 1,
            "endpoint.base_url": f"{_NOWHERE}/other",
            "endpoint.model": "another",
            "endpoint.api_key_env": _VARIABLE,
            "sampling.max_tokens": 100,
            "sampling.max_tokens_field": "max_completion_tokens",
            "sampling.temperature": 0.5,
            "sampling.top_p": 0.5,
            "sampling.reasoning_effort": "low",
            "instruction": "Be brief.",
        }
    )
    | _each({"max_bad_rows": 1}, before={"prompts.path": "@broken.jsonl"}),
    asked_from_store: _each({"rows_cache_dir": "@cache"}, before={"prompts.path": "@store"}),
    counted: _each(
        {
            "num_tries": 1,
            "prices.input_million": 2.0,
            "prices.output_million": 20.0,
            "budget": 0.001,
        }
    ),
    kept: _each({"cache_dir": "@replies"}),
    failed: _each({"endpoint.max_attempts": 2, "max_failed_in_row": 2}),
    late: _each({"endpoint.deadline_seconds": 0.05}, before={"max_rows": 1}),
    waits: _each({"endpoint.backoff_seconds": 0.5, "endpoint.max_wait_seconds": 0.0005}),
    num_lines: _each({"line_every_steps": 2}),
    judged: prompt_fields.judge("teacher.judge."),
}
_REFUSING = {
    "teacher.limit_image_pixels",
    "teacher.max_bad_rows",
    "teacher.rows_cache_dir",
    "teacher.max_failed_in_row",
}
_ELSEWHERE = {
    "tests/commands/test_teacher.py: how many requests are under way": (
        "teacher.endpoint.num_concurrent",
    ),
}


def test_every_field_is_in_the_table_or_named_with_the_test_that_sees_it():
    found, named = field_tables.seen(_TABLE), field_tables.named(_ELSEWHERE)
    assert not found & named
    fields = {f for f in field_tables.fields(curate_main.Config) if f.startswith("teacher.")}
    assert fields - named == found


@pytest.mark.parametrize("probe", _TABLE)
def test_a_probe_sees_the_same_twice(seen, probe):
    assert seen.look(probe, {}) == seen.base(probe, {})


@pytest.mark.parametrize(("probe", "before", "after"), field_tables.cases(_TABLE))
def test_every_field_changes_what_is_seen(seen, probe, before, after):
    seen.assert_change_shows(probe, before, after)
