"""A reward function of the user's: its contract, its failures by name, and its limits."""

import os
import time

import pytest

from prism_jax import errors, user_functions
from prism_jax.rewards import custom, score
from prism_jax.setup import judging
from tests.rewards.test_score import STRICT, respond, task

_FILE = """\
import os
import sys
import time

print("what a file prints goes to standard error")
from beside import SHARE


def score(sample):
    print("so does this")
    assert sys.stdin.read() == ""
    answer = sample["answer"]
    if answer == "hang":
        time.sleep(3600)
    if answer == "exit":
        os._exit(7)
    if answer == "memory":
        return float(len(bytearray(1 << 40)))
    if answer == "raise":
        return sample["no such field"]
    values = {"nan": float("nan"), "big": 1.5, "text": "0.5", "none": None, "empty": {}}
    values |= {"true": True, "named": {"total": 1, "a b": 0}, "other": {"total": 1, "new": 0}}
    if answer in values:
        return values[answer]
    near = float(answer == sample["ground_truth"])
    return {"total": SHARE * near, "accuracy": near, "near": 0.25, "seen": sample["ended"]}


constant = lambda sample: 0.5
wrong = 3
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    (folder / "beside.py").write_text("SHARE = 0.5\n")
    (folder / "reward.py").write_text(_FILE)
    return folder / "reward.py"


def _rewards(path, name="score", **changes):
    values = {
        "judge": "strict",
        "custom": f"{path}:{name}",
        "accuracy_weight": 0.8,
        "format_weight": 0.2,
        "num_workers": 1,
        "deadline_seconds": 2.0,
        "memory_bytes": 2 << 30,
    }
    return judging.Rewards(**values | changes)


@pytest.fixture(scope="module")
def pool(path):
    function = user_functions.find(f"{path}:score", field="custom")
    limits = {"deadline_seconds": 2.0, "memory_bytes": 2 << 30}
    pool = custom.CustomPool(function, STRICT, num_workers=2, **limits)
    yield pool
    pool.close()


def test_a_reward_is_the_weighted_total_and_the_format_with_all_parts(pool):
    tasks = [task(respond("3")), task(respond("4")), task("<answer>3</answer>", ended=False)]
    right, wrong, malformed = pool.grade(tasks)
    assert right.parts == {"total": 0.5, "accuracy": 1, "near": 0.25, "seen": 1}
    assert (right.total, right.accuracy, right.format) == (0.8 * 0.5 + 0.2, 1, 1)
    assert (wrong.total, wrong.accuracy) == (0.2, 0)
    # The function sees a response whose format is wrong, and decides.
    assert (malformed.total, malformed.accuracy, malformed.format) == (0.8 * 0.5, 1, 0)
    assert malformed.parts["seen"] == 0
    assert {one.reason for one in (right, wrong, malformed)} == {score.Reason.SCORED}


@pytest.mark.parametrize(
    ("answer", "reason", "told"),
    [
        ("hang", "timeout", "no answer within 2.0 s"),
        ("exit", "error", "the process ended with code 7"),
        ("memory", "error", "MemoryError"),
        ("raise", "error", "line 20: KeyError: 'no such field'"),
        ("nan", "error", "returned nan for total; it must be in [0, 1]"),
        ("big", "error", "returned 1.5 for total; it must be in [0, 1]"),
        ("text", "error", "returned '0.5' for total; it must be a number"),
        ("none", "error", "returned None for total; it must be a number"),
        ("empty", "error", "returned a dict without 'total', with nothing"),
        ("named", "error", "returned a part with the name 'a b'"),
    ],
)
def test_a_failure_is_named_and_costs_only_its_response(pool, answer, reason, told):
    start = time.monotonic()
    before, failed, after = pool.grade([task(respond(text)) for text in ("3", answer, "3")])
    assert before.total == after.total == 0.8 * 0.5 + 0.2
    assert (failed.total, failed.reason, failed.parts) == (0, score.Reason(reason), None)
    assert told in failed.detail
    assert time.monotonic() - start < 20


def test_failures_are_counted_and_the_first_is_named_on_standard_error(path, capsys):
    with _rewards(path).open_judge() as judge:
        texts = ("3", "raise", "true", "other")
        rewards = judge.grade([task(respond(text), row={"id": f"row {text}"}) for text in texts])
        assert score.count_reasons(rewards) == {"scored": 1, "timeout": 0, "error": 3}
    told = capsys.readouterr().err
    assert "config.rewards.custom: no reward for 3 of 4 responses; the first, to row raise:" in told
    assert "error: line 20: KeyError" in told
    # A metric of some responses alone would be another metric.
    assert rewards[2].detail.startswith("returned the parts total, before accuracy, near, seen")


def test_a_function_that_has_never_given_a_reward_stops_the_run(path):
    with _rewards(path).open_judge() as judge:
        with pytest.raises(errors.InputError, match="no reward for 2 of 2 responses; the first"):
            judge.grade([task(respond("raise")), task(respond("nan"))])


def test_a_file_that_cannot_be_loaded_is_one_line(path):
    (path.parent / "broken.py").write_text("def score(sample): return 1\nimport no_such_package\n")
    for name, told in (
        (f"{path.parent / 'broken.py'}:score", "line 2: ModuleNotFoundError"),
        (f"{path}:wrong", "wrong must be a function, got int"),
    ):
        file, _, function = name.rpartition(":")
        with _rewards(file, function).open_judge() as judge:
            with pytest.raises(errors.InputError, match=f"cannot be loaded: .*{told}"):
                judge.grade([task(respond("3"))])


def test_names_are_checked_before_anything_is_executed(path, tmp_path):
    marker = tmp_path / "executed"
    file = tmp_path / "x.py"
    file.write_text(f"open({os.fspath(marker)!r}, 'w')\ndef score(sample): return 1\n")
    digest = _rewards(file).digests()["rewards.custom"]
    file.write_text(file.read_text() + "\n")
    assert _rewards(file).digests()["rewards.custom"] != digest
    (tmp_path / "y.py").write_text("def score(:\n")
    for text, told in (
        ("score", "must be FILE.py:FUNCTION"),
        (f"{path}", "must be FILE.py:FUNCTION"),
        (f"{tmp_path}/no.py:score", "No such file"),
        (f"{tmp_path}/y.py:score", "not Python"),
        (f"{file}:scores", "defines no scores"),
    ):
        with pytest.raises(errors.InputError, match=told):
            user_functions.find(text, field="config.rewards.custom")
    assert not marker.exists()


def test_any_callable_of_the_file_will_do(path):
    with _rewards(path, "constant").open_judge() as judge:
        (reward,) = judge.grade([task(respond("3"))])
    assert (reward.total, reward.accuracy) == (0.8 * 0.5 + 0.2, 0.5)
