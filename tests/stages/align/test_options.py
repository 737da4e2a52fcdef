"""Alignment's options beyond the released code: together in a run, and each by itself."""

import dataclasses
import json
import os
import signal
import types

import numpy as np
import pytest

from prism_jax import errors
from prism_jax.checkpoints import checkpoint
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import step_scores
from prism_jax.rewards import score
from prism_jax.running import metric_writers
from prism_jax.stages.align import advantages as align_advantages
from prism_jax.stages.align import gate as align_gate
from tests.stages import discriminator_probes as probes
from tests.stages import rl_run, sft_run
from tests.stages.align import align_run

_STEADYING = {
    "gradient_penalty": 0.1,
    "penalty_noise": 0.1,
    "ema_decay": 0.5,
    "replay_prompts": 1,
    "replay_steps": 2,
}
_OPTIONS = {
    "train.num_steps": 4,
    "rollout.num_responses": 4,
    "rollout.max_response_tokens": 96,
    "rollout.dump_every_steps": 4,
    "checkpoint.save_every_steps": 1,
    "discriminator.optim.peak": 0.01,
    "discriminator.lengths.is_fitted": True,
    "discriminator.lengths.match_ratio": 8.0,
    "discriminator.lengths.equal_min_tokens": 4,
    "discriminator.lengths.swap_coefficient": 0.5,
    "pace.discriminator_max_accuracy": 0.99,
    "pace.policy_min_accuracy": 0.01,
    "advantage.scale": "step",
    "advantage.std_floor": 0.01,
    "advantage.teacher_gate": "verify",
    "distill.kind": "reverse",
    "distill.coefficient": 0.5,
    "honesty.every_steps": 4,
    "held_out.every_steps": 2,
    "held_out.num_prompts": 2,
} | {f"discriminator.steadying.{name}": value for name, value in _STEADYING.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with rl_run.compiled_once(tmp_path_factory.mktemp("compiled")):
        folder = rl_run.write(tmp_path_factory.mktemp("options"))
        rl_run.write_teacher(folder)
        yield folder


def _run(folder, workdir):
    overrides = [f"--config.{name}={value}" for name, value in _OPTIONS.items()]
    overrides.append(f"--config.held_out.path={folder / 'corpus' / 'rl' / 'train.parquet'}")
    overrides.append(f"--config.distill.folder={folder / 'teacher'}")
    with align_run.scripted(folder / "tok"):
        return rl_run.run("align", folder, workdir, *overrides)


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("learned")
    assert _run(folder, workdir) == 0
    return workdir


def test_all_options_work_together_and_show_what_they_did(learned):
    rows = rl_run.rows(learned)
    for row in rows:
        for name in ("caption", "cot"):
            assert np.isfinite(row[f"discriminator/{name}_length_slope"])
            assert row[f"discriminator/{name}_matched_fraction"] <= 1
        assert 0 <= row["discriminator/swap_pair_accuracy"] <= 1
        # The corpus' teachers are right.
        assert row["reward/teacher_accuracy_mean"] == 1
        assert row["policy/is_updated"] in (0, 1)
        # The open teacher reads what the policy learns from.
        assert ("policy/teacher_kl" in row) == bool(row["policy/is_updated"])
        assert row.get("policy/teacher_kl", 1) > 0
        is_updated = row["discriminator/is_updated"]
        assert ("discriminator/gradient_penalty" in row) == bool(is_updated)
    assert rows[0]["discriminator/is_updated"] == 1
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [2, 4]
    assert "honesty/caption_similar_fraction" in rows[-1]
    # Of this step's responses alone, although earlier ones were learned from too.
    dump = (learned / "rollouts" / "00000004.jsonl").read_text().splitlines()
    assert len(dump) == 8
    assert json.loads((learned / "best.json").read_text())["metric"] == "eval/accuracy"


def test_the_mean_of_weights_follows_the_discriminator(learned):
    leaves = checkpoint.read_meta(str(learned), step=4)["leaves"]
    mean = {
        name.removeprefix("mean_discriminator/"): leaf
        for name, leaf in leaves["opt_state"].items()
        if name.startswith("mean_discriminator/")
    }
    assert mean.keys() == leaves["discriminator.params"].keys()
    assert {leaf["dtype"] for leaf in mean.values()} == {"float32"}
    assert any(mean[name] != leaf for name, leaf in leaves["discriminator.params"].items())


def test_a_run_with_all_options_goes_on_bit_for_bit(folder, learned, tmp_path):
    write = metric_writers.JsonLines.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric_writers.JsonLines, "write", write_and_stop)
        assert _run(folder, tmp_path) == 143
    assert _run(folder, tmp_path) == 0
    assert sft_run.checksums(tmp_path) == sft_run.checksums(learned)
    assert rl_run.rows(tmp_path) == rl_run.rows(learned)
    assert (tmp_path / "best.json").read_text() == (learned / "best.json").read_text()


_OK = np.array([1, 1, 1, 0, 1, 1, 1, 1], bool)
_RIGHT = np.float32([1, 0, 1, 1, 1, 0, 0, 1])


def _advantages(folder, gate, is_trusted):
    changes = {
        "advantage.mode": "align",
        "advantage.accuracy": "off",
        **{f"advantage.{name}": None for name in ("align_coef", "wrong_penalty")},
        **{f"advantage.{name}_weight": None for name in ("accuracy", "format")},
        "advantage.teacher_gate": gate,
    }
    options = probes.options("align", folder, changes)
    scores = {name: probes._numbers(_OK)[name] for name in ("caption", "cot")}
    found = align_advantages.make_advantages(options)(scores, _OK, _RIGHT, is_trusted)
    return np.asarray(found["response"])


def test_a_prompt_with_a_wrong_teacher_is_dropped_or_learned_from_the_judge(folder):
    plain = _advantages(folder, "off", None)
    is_trusted = np.array([False, True])
    dropped, verified = (_advantages(folder, gate, is_trusted) for gate in ("drop", "verify"))
    np.testing.assert_array_equal(dropped[4:], plain[4:])
    np.testing.assert_array_equal(verified[4:], plain[4:])
    assert not dropped[:4].any() and plain[:4].any()
    # The fourth is malformed: its right answer does not count, and it pays the penalty.
    accuracy = np.array([1, 0, 1, 0])
    expected = (accuracy - 0.5) / accuracy.std(ddof=1) - 1.5 * np.array([0, 0, 0, 1])
    np.testing.assert_allclose(verified[:4], expected, rtol=1e-4)
    everyone = np.array([True, True])
    np.testing.assert_array_equal(_advantages(folder, "drop", everyone), plain)


def test_no_pair_of_a_wrong_teacher_is_learned_from():
    places = {"cot": dataclasses.replace(probes._numbers(_OK)["cot"])}
    (found,) = step_scores.of_trusted(places, np.array([False, True])).values()
    np.testing.assert_array_equal(found.is_pair, [False] * 4 + [True] * 4)


def test_each_teacher_is_judged_once():
    asked = []

    class Judge:
        def grade(self, tasks):
            asked.extend(task.response for task in tasks)
            right = [float("12" in task.response) for task in tasks]
            reason = score.Reason.CORRECT
            return [score.Reward(total=x, accuracy=x, format=1.0, reason=reason) for x in right]

    rows = [
        types.SimpleNamespace(
            teacher_caption="<caption>a</caption>",
            teacher_cot=f"<think>b</think><answer>{answer}</answer>",
            ground_truth="12",
            equivalent_answers=(),
            data_source=None,
        )
        for answer in (12, 7)
    ]
    gate = align_gate.TeacherGate(Judge())
    for chosen in ([0, 1, 1], [1, 0]):
        prompts = types.SimpleNamespace(rows=[rows[n] for n in chosen])
        np.testing.assert_array_equal(gate(prompts), [n == 0 for n in chosen])
    assert len(asked) == 2


def test_the_pace_goes_by_the_accuracy_of_pairs(folder):
    scores = discriminator_loss.Scores(
        teacher=np.float32([1, 0]),
        student=np.float32([0, 1, 2, 0]),
        is_pair=np.array([1, 1, 0, 1], bool),
        teacher_tokens=np.ones(2),
        student_tokens=np.ones(4),
    )
    # Right, a tie, no pair, a tie; and a name without a pair.
    none = dataclasses.replace(scores, is_pair=np.zeros(4, bool))
    assert step_scores.pair_accuracy({"cot": scores, "caption": none}) == pytest.approx(2 / 3)
    assert step_scores.pair_accuracy({"cot": none}) is None
    pace = probes.options(
        "align",
        folder,
        {"pace.discriminator_max_accuracy": 0.9, "pace.policy_min_accuracy": 0.55},
    ).pace
    found = [
        (pace.has_discriminator_update(x), pace.has_policy_update(0, x))
        for x in (0.5, 0.55, 0.9, 0.95, None)
    ]
    assert found == [(True, False), (True, True), (True, True), (False, True), (True, True)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"discriminator.lengths.match_ratio": 0.5}, "match_ratio must be >= 1"),
        (
            {"discriminator.lengths.is_fitted": True, "discriminator.microbatch_pairs": 2},
            "lengths.is_fitted needs microbatch_pairs = None",
        ),
        (
            {
                "discriminator.lengths.is_fitted": True,
                "discriminator.length_beta": (("cot", 0.1),),
            },
            "length_beta must be empty where lengths.is_fitted",
        ),
        (
            {
                "discriminator.lengths.swap_coefficient": 1.0,
                "discriminator.rows.has_shared_prompts": True,
            },
            "has_shared_prompts must be False with lengths.swap_coefficient",
        ),
        (
            {
                "discriminator.lengths.swap_coefficient": 1.0,
                "discriminator.sees_images": False,
            },
            "swap_coefficient must be None without pictures",
        ),
        ({"discriminator.steadying.gradient_penalty": 1.0}, "both or none must be given"),
        ({"discriminator.steadying.replay_steps": 1}, "both or none must be given"),
        (
            {
                "discriminator.steadying.replay_prompts": 9,
                "discriminator.steadying.replay_steps": 1,
            },
            "replay_prompts must be <= rollout.num_prompts = 2, got 9",
        ),
        ({"discriminator.steadying.ema_decay": 1.0}, r"ema_decay must be in \(0, 1\)"),
        (
            {"advantage.scale": "none", "advantage.std_floor": 0.1},
            "std_floor must be None for the scale 'none'",
        ),
        (
            {"advantage.accuracy": "nobody", "advantage.teacher_gate": "drop"},
            "teacher_gate must be 'off' where nobody judges",
        ),
        ({"pace.policy_min_accuracy": 1.5}, r"policy_min_accuracy must be in \[0, 1\]"),
    ],
)
def test_what_does_not_fit_together_is_refused(folder, changes, told):
    with pytest.raises(errors.InputError, match=told):
        probes.options("align", folder, changes)
