"""The best step of a run is kept and named, and a run that no longer gets better ends."""

import functools
import json

import pytest

from prism_jax import errors
from prism_jax.checkpoints import best_step, checkpoint
from prism_jax.running import best as best_lib
from prism_jax.running import loop, preemption
from tests import toy_run

# After 4, 8, 12, 16, 20 steps; the toy keeps the three newest checkpoints, of every third step.
_VALUES = {4: 0.2, 8: 0.7, 12: 0.6, 16: 0.7, 20: 0.5, 24: 0.1}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs or continues the toy with evaluations of these values."""
    make = loop.Stage

    def start(*, num_steps, patience=None, is_kept=True, stops_at=None):
        best = best_lib.Best(tmp_path, metric="eval/value", is_kept=is_kept, patience=patience)
        monkeypatch.setattr(loop, "Stage", functools.partial(make, best=best))
        asked = []

        def evaluate(state, step):
            del state
            asked.append(step)
            if step == stops_at:
                raise preemption.Preempted(step)
            return {"eval/value": _VALUES[step]}

        toy_run.run(tmp_path, num_steps=num_steps, evaluate=evaluate)
        return asked

    return start


def _steps(folder):
    with toy_run.open_checkpointer(folder) as checkpointer:
        return checkpointer.steps()


def _named(folder):
    return json.loads((folder / "best.json").read_text())


def test_the_first_of_the_best_steps_is_named_and_kept_beside_the_newest(run, tmp_path):
    assert run(num_steps=24) == [4, 8, 12, 16, 20, 24]
    named = _named(tmp_path)
    assert (named["step"], named["value"]) == (8, 0.7)
    assert named["evaluations"] == [[step, value] for step, value in _VALUES.items()]
    assert _steps(tmp_path) == [8, 18, 21, 24]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["eval/best_step"] for row in rows if "eval/value" in row] == [4, 8, 8, 8, 8, 8]
    assert best_step.number_of(tmp_path, "best") == 8


def test_a_run_that_does_not_get_better_ends_and_stays_ended(run, tmp_path):
    assert run(num_steps=24, patience=2) == [4, 8, 12, 16]
    assert _steps(tmp_path)[-1] == 16
    # Killed before the record of its end was written, it does not go on.
    assert run(num_steps=24, patience=2) == []
    assert _steps(tmp_path)[-1] == 16


def test_nothing_is_kept_or_stopped_where_nothing_says_so(run, tmp_path):
    assert run(num_steps=24, is_kept=False) == [4, 8, 12, 16, 20, 24]
    assert _steps(tmp_path) == [18, 21, 24]
    assert _named(tmp_path)["step"] == 8


def test_a_resumed_run_forgets_the_evaluations_of_the_steps_that_it_runs_again(run, tmp_path):
    with pytest.raises(preemption.Preempted):
        run(num_steps=24, stops_at=16)
    # Killed in an evaluation: the newest checkpoint is that of step 15, of the best step 8.
    assert _steps(tmp_path)[-1] == 15
    later = json.loads((tmp_path / "best.json").read_text())
    later["evaluations"].append([16, 0.9])
    (tmp_path / "best.json").write_text(json.dumps(later | {"step": 16, "value": 0.9}))
    assert run(num_steps=24) == [16, 20, 24]
    assert _named(tmp_path)["evaluations"] == [[step, value] for step, value in _VALUES.items()]
    assert _steps(tmp_path) == [8, 18, 21, 24]


def test_a_folder_without_evaluations_has_no_best_step(tmp_path):
    with pytest.raises(errors.InputError, match=r"has no best\.json"):
        best_step.number_of(tmp_path, "best")
    assert [best_step.number_of(tmp_path, step) for step in (None, 3)] == [None, 3]
    (tmp_path / "best.json").write_text("{}")
    with pytest.raises(errors.InputError, match="damaged"):
        best_step.number_of(tmp_path, "best")


def test_a_value_that_is_not_finite_ends_the_run(tmp_path):
    best = best_lib.Best(tmp_path, metric="eval/value", is_kept=True, patience=None)
    with pytest.raises(errors.RunError, match="eval/value is nan after step 3"):
        best.add(3, {"eval/value": float("nan")})


def test_a_checkpointer_keeps_one_step_at_a_time(tmp_path):
    abstract, make_state, _ = toy_run.setup()
    del abstract
    with toy_run.open_checkpointer(tmp_path, num_kept=1) as checkpointer:
        for step, kept in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 3)):
            checkpointer.keep(kept)
            checkpointer.save(step, make_state(), data_position={"next_index": step})
            checkpointer.wait()
        assert checkpointer.steps() == [3, 5]
    assert checkpoint.read_meta(str(tmp_path), step=3)["stage"] == "toy"
