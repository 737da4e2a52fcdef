"""RLVR by its command with all that a step may leave for the next: surplus, a coefficient."""

import contextlib
import os
import signal

import pytest

from prism_jax.checkpoints import checkpoint
from prism_jax.rewards import score
from prism_jax.running import metric_writers
from prism_jax.setup import judging
from prism_jax.setup import models as setup_models
from prism_jax.stages.rlvr import step as rlvr_step
from prism_jax.training import train_step
from tests.stages import rl_run, rl_toy, sft_run


class _Judge:
    """Call a response right that has a vowel of its own and no other."""

    def grade(self, tasks):
        rewards = []
        for task in tasks:
            is_right = float("e" in task.response and "i" not in task.response)
            share = task.response.count("e") / max(1, len(task.response))
            rewards.append(
                score.Reward(
                    total=0.5 * is_right + 0.5 * share,
                    accuracy=is_right,
                    format=1.0,
                    reason=score.Reason.CORRECT if is_right else score.Reason.WRONG,
                )
            )
        return rewards


_ALL = (
    "--config.train.num_steps=4",
    "--config.train.num_minibatches=2",
    "--config.train.num_epochs=2",
    "--config.rollout.num_responses=8",
    "--config.rollout.max_response_tokens=12",
    "--config.groups.keep=accuracy",
    "--config.groups.generation_prompts=5",
    "--config.groups.max_generations=3",
    "--config.groups.surplus_steps=2",
    "--config.overlong.buffer_tokens=6",
    "--config.overlong.penalty_factor=0.1",
    "--config.reference.loss_coefficient=0.1",
    "--config.reference.reward_coefficient=0.1",
    "--config.reference.reward_target=0.05",
    "--config.reference.reward_horizon=100.0",
    "--config.algorithm.dual_clip=3.0",
    "--config.algorithm.sampler_weights=truncate",
    "--config.algorithm.sampler_high=2.0",
    "--config.checkpoint.save_every_steps=2",
    "--config.optim.peak=0.01",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with rl_run.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield rl_run.write(tmp_path_factory.mktemp("rlvr"))


def _run(folder, workdir, *overrides):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging.Rewards, "open_judge", lambda self: contextlib.nullcontext(_Judge()))
        return rl_run.run("rlvr", folder, workdir, *_ALL, *overrides)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Run without interruption; note how often the update was compiled."""
    workdir = tmp_path_factory.mktemp("whole")
    made = []
    make = train_step.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train_step, "make_train_step", lambda *a, **k: made.append(make(*a, **k)) or made[-1]
        )
        assert _run(folder, workdir) == 0
    return workdir, [step._cache_size() for step in made]


def test_all_choices_together_run_and_compile_the_update_once(whole):
    rows = rl_run.rows(whole[0])
    assert whole[1] == [1]
    assert len(rows) == 4
    assert max(row["rollout/surplus_prompts"] for row in rows) > 0
    assert max(row["rollout/older_prompts_fraction"] for row in rows) > 0
    # At the start the policy is its own reference; then it moves away.
    assert abs(rows[0]["reward/reference_kl"]) < 1e-6
    assert abs(rows[3]["reward/reference_kl"]) > 1e-4
    coefficients = [row["reward/reference_kl_coefficient"] for row in rows]
    assert len(set(coefficients)) == 4
    assert "policy/sampler_weight_mean" in rows[0]


def test_a_run_with_surplus_stopped_by_sigterm_goes_on_bit_for_bit(folder, whole, tmp_path):
    experience, steps = rlvr_step.Experience.__call__, []

    def stopped(self, state, prompts, key):
        steps.append(None)
        # Between the rollouts and the update of the fourth step.
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return experience(self, state, prompts, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlvr_step.Experience, "__call__", stopped)
        assert _run(folder, tmp_path) == 143
    assert len(rl_run.rows(tmp_path)) == 3
    assert rl_run.rows(tmp_path)[-1]["rollout/surplus_prompts"] > 0
    assert _run(folder, tmp_path) == 0
    assert sft_run.checksums(tmp_path) == sft_run.checksums(whole[0])
    assert rl_run.rows(tmp_path) == rl_run.rows(whole[0])


def test_a_named_reference_is_read_from_its_folder_and_none_without_a_coefficient(
    folder, whole, tmp_path
):
    loaded = []
    load = setup_models.load_params
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            setup_models,
            "load_params",
            lambda model, devices: loaded.append(model) or load(model, devices),
        )
        named = (f"--config.reference.folder={whole[0]}", "--config.train.num_steps=1")
        assert _run(folder, tmp_path / "a", *named) == 0
        assert [model.source.folder for model in loaded] == [str(whole[0])]
        off = ["reward_coefficient", "loss_coefficient", "reward_target", "reward_horizon"]
        overrides = [f"--config.reference.{name}=None" for name in off]
        assert _run(folder, tmp_path / "b", "--config.train.num_steps=1", *overrides) == 0
        assert len(loaded) == 1
    # Another policy than the one that the run starts from.
    assert abs(rl_run.rows(tmp_path / "a")[0]["reward/reference_kl"]) > 1e-4
    assert not [name for name in rl_run.rows(tmp_path / "b")[0] if "reference" in name]


def test_steps_without_a_prompt_that_varies_leave_policy_and_momentum_bit_equal(folder, tmp_path):
    write = metric_writers.JsonLines.write

    def write_and_turn(self, step, values):
        write(self, step, values)
        if step == 2:
            patch.setattr(_Judge, "grade", rl_toy.Judge().grade)  # nothing is right any more

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric_writers.JsonLines, "write", write_and_turn)
        overrides = ["groups.surplus_steps=0", "checkpoint.save_every_steps=1"]
        overrides += ["checkpoint.num_kept=3", "rollout.dump_every_steps=1"]
        assert _run(folder, tmp_path, *(f"--config.{one}" for one in overrides)) == 0
    rows = rl_run.rows(tmp_path)
    assert [row["rollout/trained_prompts"] for row in rows[2:]] == [0, 0]
    assert [row["rollout/generations"] for row in rows[2:]] == [3, 3]
    assert [row["optim/grad_norm"] for row in rows[2:]] == [0, 0]
    # Two parts, twice each.
    assert [row["optim/empty_updates"] for row in rows] == [0, 0, 4, 4]
    assert [row["optim/skipped_updates"] for row in rows] == [0, 0, 0, 0]
    before, after = (checkpoint.read_meta(str(tmp_path), step=step)["leaves"] for step in (2, 4))
    assert before["params"] == after["params"]
    moments = {name: leaf for name, leaf in before["opt_state"].items() if "inner" in name}
    assert moments and moments.items() <= after["opt_state"].items()


def test_too_few_prompts_that_vary_end_the_run_where_asked(folder, tmp_path):
    # The real judge: a new policy is never right.
    overrides = (*_ALL, "--config.groups.when_short=error")
    assert rl_run.run("rlvr", folder, tmp_path, *overrides) == 2


@pytest.mark.slow
def test_eight_devices_take_the_updates_of_one(folder, whole, tmp_path):
    mesh = ("num_devices=8", "axes.data=2", "axes.fsdp=2", "axes.tensor=2")
    overrides = [f"--config.mesh.{axis}" for axis in mesh] + ["--config.rows.num_rows=-1"]
    assert _run(folder, tmp_path, *overrides, "--config.train.num_steps=1") == 0
    (row,), expected = rl_run.rows(tmp_path), rl_run.rows(whole[0])[0]
    for name in ("reward/total_mean", "policy/loss", "policy/entropy", "optim/grad_norm"):
        assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
