"""The figures of the benchmark on one GPU, and the process that it watches."""

import json
import time

import jax
import pytest

from benchmarks import eight_inputs, eight_jobs, eight_process, one_gpu, one_records
from prism_jax.checkpoints import checkpoint
from prism_jax.running import loop


def _work(folder, size="tiny"):
    return one_gpu.Work(inputs=eight_inputs.Inputs(folder=folder, size=size), out=folder / "out")


def _result(stage, rows, **notes):
    process = {"device_kind": "card", "peak_bytes": {"0": 3 << 30}, "seconds_to": {}, "saves": []}
    return {
        "layout": "single",
        "num_devices": 1,
        "command": [],
        "seconds": 60.0,
        "processes": [process | {"save_wait_times": [], "update_times": []} | notes],
        "metrics": [row | {"step": n} for n, row in enumerate(rows, start=1)],
        "goodput": None,
        "checkpoint_bytes": 0,
        "places_a_step": 8000,
        "pairs_a_step": 4,
    }


def test_a_stall_is_the_save_and_what_it_slows_until_it_is_complete():
    # Steps of 1 s; one of 3 s holds the save, the two after it take 1.5 s.
    updates = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 8.0, 9.5, 11.0, 12.0, 13.0]
    save = {"step": 6, "times": [6.0, 8.0], "compile_seconds": 0.5}
    stall = one_records.stall(save, [[5.9, 5.95], [11.0, 11.1]], updates)
    assert stall["seconds_in_save"] == pytest.approx(2.0)
    assert stall["seconds_to_complete"] == pytest.approx(5.1)
    assert stall["steps_beside"] == 2
    assert stall["usual_step_seconds"] == pytest.approx(1.0)
    assert stall["stall_seconds"] == pytest.approx(3.0)


def test_a_step_of_rlvr_is_held_against_the_bytes_of_its_rollout(tmp_path):
    job = _work(tmp_path).job("rlvr", limit_seconds=1.0)
    row = {"time/step_seconds": 10.0, "time/generate_seconds": 6.0}
    rollout = {"seconds": 6.0, "tokens": 100, "needed_bytes": 8e12}
    result = _result(
        "rlvr",
        [row | {"time/step_seconds": 90.0}, row, row],
        rollouts=[rollout | {"needed_bytes": 1.0}, rollout, rollout],
        update_seconds=[80.0, 3.5, 3.5],
        copy_bytes_a_second=2e12,
    )
    made = one_records.of_stage(job, result)
    assert list(made) == ["one_gpu_rlvr", "rlvr_step"]
    over, others = made["rlvr_step"]["ratio"].values()
    assert (over, others) == (pytest.approx(1.5), pytest.approx(0.05))
    assert made["rlvr_step"]["is_met"]


def test_the_discriminator_has_its_scores_and_its_update_of_a_step(tmp_path):
    job = _work(tmp_path).job("align", limit_seconds=1.0)
    row = {"time/step_seconds": 10.0, "time/generate_seconds": 6.0, "time/score_seconds": 1.0}
    rollout = {"seconds": 6.0, "tokens": 100}
    result = _result(
        "align",
        [row] * 3,
        rollouts=[rollout] * 3,
        model_update_seconds={"policy": [9.0, 1.0, 1.0], "discriminator": [50.0, 1.0, 2.0]},
    )
    made = one_records.of_stage(job, result)["align_one_gpu"]
    assert list(made["ratio"].values()) == [True, pytest.approx(0.25)]
    failed = {"error": "exit code 1: not enough memory", "processes": [], "metrics": []}
    made = one_records.of_stage(job, result | failed)["align_one_gpu"]
    assert list(made["ratio"].values()) == [False, None]
    assert made["raw"]["error"] == failed["error"]


def test_configurations_of_4b_are_changed_in_nothing_but_paths_and_what_the_parts_say(tmp_path):
    work = _work(tmp_path, "4b_one_gpu")
    assert work.inputs.policy.name == "4b"
    assert work.inputs.discriminator.name == "2b_x4"
    cold, warm = (work.job(name, limit_seconds=1.0) for name in ("sft.cold", "sft.warm"))
    # Another number of steps would be another program.
    assert [one for one in cold.arguments() if "workdir" not in one] == [
        one for one in warm.arguments() if "workdir" not in one
    ]
    assert cold.compiled == warm.compiled
    changed = {
        name: [text for text in work.job(name, limit_seconds=1.0).arguments() if "rollout." in text]
        for name in ("align", "rlvr", "warmup")
    }
    assert changed["align"] == changed["warmup"] == []
    assert len(changed["rlvr"]) == 3


class _Saver:
    """A checkpointer that counts what it is asked for; it is the manager behind itself as well."""

    def __init__(self):
        self._manager, self.saved, self.asked = self, [], 0

    def is_due(self, step):
        self.asked += 1
        return True

    def save(self, step, state, *, data_position):
        self.saved.append(step)

    def wait(self):
        pass

    def steps(self):
        return list(self.saved)

    def delete(self, step):
        self.saved.remove(step)


def test_states_are_saved_after_the_given_steps_each_in_the_place_of_the_one_before(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "Checkpointer", _Saver)
    for name in ("run", "restore_or_make"):
        monkeypatch.setattr(loop, name, None)
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", lambda _: None)
    watch = eight_process.Watch(
        eight_process.Settings(
            begun=time.time(),
            notes=str(tmp_path),
            tokenizer="",
            mean_tokens=1,
            save_steps=[2, 4],
            last_step=None,
        )
    )
    watch.install()
    saver = _Saver()
    assert [step for step in range(1, 6) if saver.is_due(step)] == [2, 4]
    assert saver.asked == 5  # each time it looks whether a save has failed
    for step in range(1, 6):
        saver.save(step, None, data_position=None)
        assert saver.saved == {1: [], 2: [2], 3: [2]}.get(step, [4])
    assert [save["step"] for save in watch.notes["saves"]] == [2, 4]


@pytest.mark.slow
def test_the_watched_process_ends_after_its_steps_and_saves_nothing(tmp_path):
    one_gpu.main(["--size=tiny", f"--folder={tmp_path}", "--parts", "inputs", "sft.cold"])
    record = json.loads((tmp_path / "results" / "first_step.json").read_text())
    assert record["ratio"]["cold"] > 0
    assert record["ratio"]["warm"] is None
    points = list(record["raw"]["cold"]["seconds_to"].values())
    assert points == sorted(points)
    result = eight_jobs.read(_work(tmp_path).job("sft.cold", limit_seconds=1.0).result)
    assert len(result["processes"][0]["update_times"]) == 3
    assert result["checkpoint_bytes"] == 0
    assert not list((tmp_path / "runs").iterdir())


def test_a_part_without_its_inputs_fails_and_the_next_one_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        one_gpu.main(["--size=tiny", f"--folder={tmp_path}", "--parts", "warmup", "upcycle"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["warmup", "upcycle"]
    assert all("inputs must be run first" in line for line in lines)
