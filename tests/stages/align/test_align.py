"""Alignment by its command: both models learn, resume and compile once; scores stand where due."""

import json
import os
import signal

import numpy as np
import pytest

from prism_jax.checkpoints import checkpoint
from prism_jax.policy import responses
from prism_jax.rewards import tags
from prism_jax.running import metric_writers
from prism_jax.training import train_step
from tests import make_tokenizer
from tests.stages import rl_run, sft_run
from tests.stages.align import align_run

_SCRIPTED = (
    "--config.train.num_steps=10",
    "--config.rollout.num_responses=4",
    "--config.rollout.max_response_tokens=96",
    "--config.rollout.dump_every_steps=10",
    "--config.checkpoint.save_every_steps=2",
    "--config.discriminator.optim.peak=0.01",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with rl_run.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield rl_run.write(tmp_path_factory.mktemp("align"), has_videos=True)


def _scripted(folder, workdir, *overrides, good_steps=None):
    """Run with responses from a script instead of the engine: a new policy writes no tags."""
    with align_run.scripted(folder / "tok", good_steps=good_steps):
        return rl_run.run("align", folder, workdir, *_SCRIPTED, *overrides)


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    """Train ten steps without interruption; note how often each step was compiled."""
    workdir = tmp_path_factory.mktemp("learned")
    made = []
    make = train_step.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train_step, "make_train_step", lambda *a, **k: made.append(make(*a, **k)) or made[-1]
        )
        assert _scripted(folder, workdir) == 0
    return workdir, [step._cache_size() for step in made]


def test_the_discriminator_learns_to_tell_teacher_from_policy(learned):
    rows = rl_run.rows(learned[0])
    for name in ("caption", "cot"):
        gaps = [row[f"discriminator/{name}_gap"] for row in rows]
        assert sum(gaps[-2:]) > sum(gaps[:2]) + 0.1, gaps
        assert rows[-1][f"discriminator/{name}_pair_accuracy"] == 1


def test_the_honesty_panel_asks_the_steps_own_pairs_before_they_are_learned_from(learned):
    rows = rl_run.rows(learned[0])
    measured = [row["step"] for row in rows if "honesty/num_pairs" in row]
    assert measured == [1, 2, 4, 6, 8, 10]
    for row in rows:
        if row["step"] not in measured:
            assert not any(name.startswith("honesty/") for name in row)
            continue
        assert row["honesty/num_pairs"] == 8 * row["rollout/format_fraction"]
        for name in ("caption", "cot"):
            accuracy = row[f"discriminator/{name}_pair_accuracy"]
            assert row[f"honesty/{name}_pair_accuracy"] == pytest.approx(accuracy)
            assert row[f"honesty/{name}_teacher_cut_fraction"] == 0
        # One head and no experts: it is not told the kind.
        assert not any("_swapped_" in name for name in row)
        assert row["honesty/caption_replaced_image_change"] > 0
        assert "honesty/router_information_bits_mean" not in row
    # The script's captions are shorter than any teacher's.
    last = rows[-1]
    assert last["honesty/caption_length_probe_accuracy"] == last["honesty/caption_pair_accuracy"]
    assert last["honesty/caption_probe_explains"] == 1


def test_both_steps_are_compiled_once(learned):
    assert learned[1] == [1, 1]


def test_a_dump_holds_scores_where_there_are_and_the_advantages_of_their_formula(learned):
    lines = [json.loads(line) for line in (learned[0] / "rollouts" / "00000010.jsonl").open()]
    assert len(lines) == 8
    for group in (lines[:4], lines[4:]):
        expected = np.zeros(4)
        ok = np.array([line["format_ok"] for line in group])
        for name in ("caption", "cot"):
            scores = np.array([line[f"{name}_score"] or 0.0 for line in group])
            assert [line[f"{name}_score"] is None for line in group] == (~ok).tolist()
            assert len({line[f"teacher_{name}_score"] for line in group}) == 1
            scores[~ok] = scores[ok].min() - 1 if ok.any() else -1
            if np.ptp(scores) > 0:
                expected += 0.5 * (scores - scores.mean()) / (scores.std(ddof=1) + 1e-6)
        expected -= 1.5 * ~ok
        np.testing.assert_allclose([x["advantage"] for x in group], expected, atol=2e-3)
    assert {line["format_ok"] for line in lines} == {True, False}


@pytest.mark.slow
def test_eight_devices_take_the_step_of_one(folder, learned, tmp_path):
    mesh = ("num_devices=8", "axes.data=2", "axes.fsdp=2", "axes.tensor=2")
    overrides = [f"--config.mesh.{axis}" for axis in mesh]
    overrides += ["--config.rows.num_rows=-1", "--config.discriminator.rows.num_rows=-1"]
    assert _scripted(folder, tmp_path, *overrides, "--config.train.num_steps=1") == 0
    (row,), expected = rl_run.rows(tmp_path), rl_run.rows(learned[0])[0]
    assert {name.split("/")[0] for name in row} > {"discriminator", "policy", "optim"}
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=2e-3, abs=2e-5), name


def test_a_run_stopped_by_sigterm_goes_on_bit_for_bit_in_both_models(folder, learned, tmp_path):
    write = metric_writers.JsonLines.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric_writers.JsonLines, "write", write_and_stop)
        assert _scripted(folder, tmp_path) == 143
    assert _scripted(folder, tmp_path) == 0
    assert sft_run.checksums(tmp_path) == sft_run.checksums(learned[0])
    assert rl_run.rows(tmp_path) == rl_run.rows(learned[0])
    assert {"policy.params", "discriminator.params"} <= set(sft_run.checksums(tmp_path))


def test_the_policy_moves_to_what_the_discriminator_prefers(folder, tmp_path):
    """Cut whatever the policy says in the middle, so that a new policy can learn from scores."""

    def read(self, rollout):
        del self
        return [
            tags.Segments(
                text="",
                format_ok=True,
                ended=bool(ended),
                caption_chars=0,
                caption_tokens=max(1, int(length) // 2),
                cot_tokens=int(length) - int(length) // 2,
                response_tokens=int(length),
            )
            for length, ended in zip(rollout.lengths, rollout.ended, strict=True)
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(responses.Reader, "read", read)
        assert (
            rl_run.run(
                "align",
                folder,
                tmp_path,
                "--config.train.num_steps=8",
                "--config.rollout.num_responses=16",
                "--config.rollout.max_response_tokens=4",
                "--config.optim.peak=0.05",
                "--config.discriminator.optim.peak=1e-9",
                "--config.rollout.dump_every_steps=None",
                "--config.checkpoint.save_every_steps=8",
            )
            == 0
        )
    rows = rl_run.rows(tmp_path)
    for name in ("caption", "cot"):
        scores = [row[f"discriminator/{name}_student_score"] for row in rows]
        assert np.mean(scores[-2:]) > np.mean(scores[:2]) + 0.06, scores
    assert max(row["policy/sampler_logprob_difference_max"] for row in rows) < 1e-4


@pytest.mark.parametrize(("all_invalid", "is_moved"), [("none", False), ("released", True)])
def test_a_step_without_a_pair_leaves_the_discriminator_and_its_momentum_bit_equal(
    folder, tmp_path, all_invalid, is_moved
):
    overrides = ["train.num_steps=4", "checkpoint.save_every_steps=1", "honesty.every_steps=None"]
    overrides += ["discriminator.regulariser=0.1", f"discriminator.all_invalid={all_invalid}"]
    overrides = [f"--config.{one}" for one in overrides]
    assert _scripted(folder, tmp_path, *overrides, good_steps=3) == 0
    rows = rl_run.rows(tmp_path)
    assert [row["rollout/format_fraction"] > 0 for row in rows] == [True] * 3 + [False]
    empty = [row["optim/discriminator_empty_updates"] for row in rows]
    assert empty == [0, 0, 0, int(not is_moved)]
    before, after = (checkpoint.read_meta(str(tmp_path), step=step)["leaves"] for step in (3, 4))
    items = [
        {f"{item}/{name}": leaf for item in saved for name, leaf in saved[item].items()}
        for saved in (before, after)
    ]
    own = {name for name in items[0] if "discriminator" in name and not name.endswith("/step")}
    assert len(own) > 3 * len(before["discriminator.params"])
    changed = {name for name in items[0] if items[0][name] != items[1][name]}
    assert bool(own & changed) == is_moved
    # The policy learns from its penalties.
    assert {name.split("/")[0] for name in changed} >= {"policy.params", "opt_state"}


@pytest.mark.parametrize(("response_tokens", "is_named"), [(16, True), (96, False)])
def test_rows_too_short_for_a_teacher_name_the_field_that_cuts_it(
    folder, tmp_path, capsys, response_tokens, is_named
):
    overrides = (
        "--config.discriminator.rows.row_tokens=60",
        f"--config.rollout.max_response_tokens={response_tokens}",
    )
    assert rl_run.run("align", folder, tmp_path, *overrides) == 2
    told = capsys.readouterr().err
    assert "config.discriminator.rows.row_tokens must be >= " in told
    assert ("config.discriminator.teacher_max_tokens cuts" in told) == is_named


def test_models_that_read_tokens_differently_are_refused(folder, tmp_path, capsys):
    other = tmp_path / "other"
    make_tokenizer.write(other, num_merges=100, min_pixels=32 * 32, max_pixels=64 * 64)
    told = "must have the same tokens"
    override = f"--config.discriminator.folder={other}"
    assert rl_run.run("align", folder, tmp_path / "run", override) == 2
    assert told in capsys.readouterr().err
