"""RLVR by its command, on a policy that is made anew: it learns, resumes, compiles once."""

import contextlib
import json
import os
import signal

import numpy as np
import pytest

from prism_jax.rewards import score
from prism_jax.running import metric_writers
from prism_jax.setup import judging
from prism_jax.stages.rlvr import advantages as rlvr_advantages
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.training import train_step
from tests.stages import rl_run, sft_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with rl_run.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield rl_run.write(tmp_path_factory.mktemp("rlvr"), has_videos=True)


class _Vowels:
    """Reward the share of letters that are an e: a judge whose reward a new policy can raise."""

    def grade(self, tasks):
        shares = [task.response.count("e") / max(1, len(task.response)) for task in tasks]
        return [
            score.Reward(total=share, accuracy=share, format=1.0, reason=score.Reason.CORRECT)
            for share in shares
        ]


_LEARN = (
    "--config.train.num_steps=12",
    "--config.rollout.num_responses=16",
    "--config.rollout.max_response_tokens=12",
    "--config.rollout.dump_every_steps=6",
    "--config.checkpoint.save_every_steps=2",
    "--config.optim.peak=0.05",
)


def _learn(folder, workdir, *overrides):
    """Run with the vowels' judge in place of the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging.Rewards, "open_judge", lambda self: contextlib.nullcontext(_Vowels()))
        return rl_run.run("rlvr", folder, workdir, *_LEARN, *overrides)


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    """Train twelve steps without interruption; note how often the step was compiled."""
    workdir = tmp_path_factory.mktemp("learned")
    made = []
    make = train_step.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train_step, "make_train_step", lambda *a, **k: made.append(make(*a, **k)) or made[-1]
        )
        assert _learn(folder, workdir) == 0
    return workdir, [step._cache_size() for step in made]


def test_the_reward_rises_in_a_few_steps(learned):
    rewards = [row["reward/total_mean"] for row in rl_run.rows(learned[0])]
    assert sum(rewards[-2:]) > 2 * sum(rewards[:2]), rewards


def test_a_run_compiles_its_step_once(learned):
    assert learned[1] == [1]


def test_the_trainer_and_the_sampler_agree_in_every_step(learned):
    rows = rl_run.rows(learned[0])
    assert max(row["policy/sampler_logprob_difference_max"] for row in rows) < 1e-4
    assert {row["policy/clip_fraction"] for row in rows} == {0.0}


def test_a_dump_holds_every_response_with_its_reward_and_advantage(learned):
    names = sorted(path.name for path in (learned[0] / "rollouts").iterdir())
    assert names == ["00000006.jsonl", "00000012.jsonl"]
    lines = [json.loads(line) for line in (learned[0] / "rollouts" / names[1]).open()]
    assert len(lines) == 32
    row = rl_run.rows(learned[0])[11]
    mean = sum(line["reward"] for line in lines) / len(lines)
    assert mean == pytest.approx(row["reward/total_mean"], rel=1e-5)
    for prompt in range(2):
        group = lines[16 * prompt : 16 * (prompt + 1)]
        assert [line["response"] for line in group] == list(range(16))
        assert len({line["id"] for line in group}) == 1
        assert sum(line["advantage"] for line in group) == pytest.approx(0, abs=1e-4)
        best = max(group, key=lambda line: line["reward"])
        assert best["advantage"] == max(line["advantage"] for line in group)


@pytest.mark.slow
def test_eight_devices_take_the_step_of_one(folder, learned, tmp_path):
    mesh = ("num_devices=8", "axes.data=2", "axes.fsdp=2", "axes.tensor=2")
    overrides = [f"--config.mesh.{axis}" for axis in mesh] + ["--config.rows.num_rows=-1"]
    assert _learn(folder, tmp_path, *overrides, "--config.train.num_steps=1") == 0
    (row,), expected = rl_run.rows(tmp_path), rl_run.rows(learned[0])[0]
    for name in ("reward/total_mean", "policy/loss", "policy/entropy", "optim/grad_norm"):
        assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
    assert row["policy/sampler_logprob_difference_max"] < 1e-4


def test_a_run_stopped_by_sigterm_goes_on_bit_for_bit(folder, learned, tmp_path):
    write = metric_writers.JsonLines.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric_writers.JsonLines, "write", write_and_stop)
        assert _learn(folder, tmp_path) == 143
    assert len(rl_run.rows(tmp_path)) < 12
    assert _learn(folder, tmp_path) == 0
    assert sft_run.checksums(tmp_path) == sft_run.checksums(learned[0])
    assert rl_run.rows(tmp_path) == rl_run.rows(learned[0])


def test_responses_are_worth_nothing_and_teach_nothing_when_all_are_malformed(folder, tmp_path):
    assert rl_run.run("rlvr", folder, tmp_path, "--config.train.num_steps=1") == 0
    (row,) = rl_run.rows(tmp_path)
    assert (row["reward/total_mean"], row["reward/flat_groups_fraction"]) == (0, 1)
    assert (row["policy/loss"], row["optim/grad_norm"]) == (0, 0)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--config.rows.row_tokens=60", "config.rows.row_tokens must be >="),
        ("--config.rollout.temperature=0.0", "temperature must be > 0"),
        ("--config.algorithm.loss=reinforce", "clip_low must be None for reinforce"),
        ("--config.advantage.kind=rloo", "eps must be given for grpo and reinforce++"),
        ("--config.prompts.max_prompt_tokens=20", "rows are wrong"),
    ],
)
def test_wrong_configurations_are_refused_in_one_line(folder, tmp_path, capsys, override, told):
    assert rl_run.run("rlvr", folder, tmp_path, override) == 2
    assert told in capsys.readouterr().err


def test_the_advantages_that_a_configuration_names():
    rewards, prompt_id = [[1.0, 0.0, 0.0, 0.0], [0, 0, 1, 1]]
    expected = {
        # (x - mean) / std with ddof 1: std is 1 / sqrt(2).
        ("grpo", 1e-6): [0.5**0.5, -(0.5**0.5), 0, 0],
        ("dr_grpo", None): [0.5, -0.5, 0, 0],
        ("rloo", None): [1, -1, 0, 0],
    }
    for (kind, eps), values in expected.items():
        options = rlvr_config.Advantage(kind=kind, eps=eps, discount=None, credit="response")
        found = rlvr_advantages.make_advantage(options, num_groups=2)
        got = found(np.float32(rewards), np.int32(prompt_id))
        np.testing.assert_allclose(got, values, rtol=1e-5)
