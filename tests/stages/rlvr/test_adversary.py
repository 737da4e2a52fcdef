"""The adversarial term of RLVR: its advantages are added in every algorithm, until they are 0."""

import dataclasses
import os
import signal
import types

import jax
import numpy as np
import pytest

from configs import rlvr as config_file
from prism_jax import configuration, errors
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import step_scores
from prism_jax.running import metric_writers
from prism_jax.stages.rlvr import adversary as rlvr_adversary
from prism_jax.stages.rlvr import adversary_config
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import credit as rlvr_credit
from tests.stages import rl_run, rl_toy, sft_run
from tests.stages.align import align_run

_ALGORITHMS = ("grpo", "dapo", "gspo", "dr_grpo", "cispo", "rloo", "reinforce++")


def _adversary(**changes):
    config = config_file.get_config("tiny,adversary").adversary
    config.discriminator.folder = "none"
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return configuration.parse(adversary_config.Adversary, config)


class _Scorer:
    """Score captions by how many of their letters are a c, and cots at random."""

    def __call__(self, params, prompts, responses, *, num_prompts):
        del params, prompts
        tokens, lengths = responses.rollout.tokens, responses.rollout.lengths
        is_ok = np.array([one.format_ok for one in responses.segments])
        noise = np.random.default_rng(len(tokens)).normal(size=len(tokens))
        scores = {"caption": (tokens == 3).sum(1), "cot": noise}
        by_name = {
            name: discriminator_loss.Scores(
                teacher=np.zeros(num_prompts, np.float32),
                student=np.where(is_ok, values, 0).astype(np.float32),
                is_pair=is_ok,
                teacher_tokens=np.ones(num_prompts, np.int32),
                student_tokens=lengths,
            )
            for name, values in scores.items()
        }
        return step_scores.StepScores(
            by_name=by_name, rewarding=by_name, batch=None, places={}, metrics={}
        )


def _learned(name, adversary, *, num_steps):
    """Return the table after each step of an algorithm beside this adversary, or none."""
    changes = {"rollout.num_responses": 8}
    if name == "dapo":
        changes["groups.max_generations"] = 3
    run = rl_toy.Run(rl_toy.options_of(name, changes))
    experience = run.experience
    if adversary is not None:
        cutter = types.SimpleNamespace(prompts=lambda rows: [], teachers=lambda rows: [])
        scoring = rlvr_adversary.Scoring(adversary, cutter, _Scorer(), credit="response")
        experience = dataclasses.replace(experience, adversary=scoring)
    tables = []
    for step in range(num_steps):
        key = jax.random.fold_in(jax.random.key(0), step)
        state = run.state
        if adversary is not None:
            state = {"policy": state, "discriminator": types.SimpleNamespace(params=None)}
        batch, _ = experience(state, next(run.feed), key)
        batch = batch if adversary is None else batch.policy
        run.state, _ = run.update(run.state, batch, key)
        tables.append(run.table)
    return tables


def _share_of_c(table):
    return float(np.exp(rl_toy.log_softmax(table))[1:, 3].mean())


@pytest.mark.parametrize("name", _ALGORITHMS)
def test_every_algorithm_learns_from_the_adversary_too_and_without_weight_as_if_there_were_none(
    name,
):
    none = _adversary(coefficient=0.0, end_coefficient=None, decay_steps=None)
    # Dynamic sampling of few prompts learns more slowly.
    num_steps = 8 if name == "dapo" else 5
    plain = _learned(name, None, num_steps=num_steps)
    np.testing.assert_array_equal(_learned(name, none, num_steps=1)[0], plain[0])
    strong = _adversary(coefficient=9.0, end_coefficient=None, decay_steps=None, cot_weight=0.0)
    learned = _learned(name, strong, num_steps=num_steps)
    assert _share_of_c(learned[-1]) > _share_of_c(plain[-1]) + 0.05


def test_the_coefficient_falls_in_a_line_and_stays_at_its_end():
    falling = _adversary(coefficient=2.0, end_coefficient=0.5, decay_steps=3)
    found = [falling.coefficient_at(step) for step in range(1, 7)]
    np.testing.assert_allclose(found, [2.0, 1.5, 1.0, 0.5, 0.5, 0.5])
    constant = _adversary(coefficient=2.0, end_coefficient=None, decay_steps=None)
    assert constant.coefficient_at(1) == constant.coefficient_at(1000) == 2.0


@pytest.mark.parametrize("credit", ["response", "segment", "segment_shared"])
def test_each_token_gets_the_advantage_of_its_segment_times_the_coefficient(credit):
    options = rl_toy.options_of("", {})
    run = rl_toy.Run(options)
    filled, _ = run.experience.sampling(
        run.state.params, next(run.feed), run.feed, jax.random.key(3), step=1
    )
    adversary = _adversary(coefficient=3.0, end_coefficient=None, decay_steps=None)
    cutter = types.SimpleNamespace(prompts=lambda rows: [], teachers=lambda rows: [])
    scoring = rlvr_adversary.Scoring(adversary, cutter, _Scorer(), credit=credit)
    state = {"discriminator": types.SimpleNamespace(params=None)}
    scored = scoring(1, state, filled.groups)
    responses = rlvr_adversary.responses_of(filled.groups)
    scores = _Scorer()(None, None, responses, num_prompts=4).rewarding
    is_ok = scores["cot"].is_pair
    assert 0 < is_ok.sum() < len(is_ok)
    normalised = {}
    for name, one in scores.items():
        rows = []
        for values, ok in zip(one.student.reshape(4, -1), is_ok.reshape(4, -1), strict=True):
            lowest = values[ok].min() if ok.any() else 0.0
            values = np.where(ok, values, lowest - 1)
            spread = values.std(ddof=1) + 1e-6
            rows.append((values - values.mean()) / spread if np.ptp(values) else 0 * values)
        normalised[name] = np.concatenate(rows)
    shared = {"response": 0.5, "segment": 0.0, "segment_shared": 0.5}[credit]
    factor = 1.0 if credit != "response" else 0.5
    lengths = responses.rollout.lengths
    values = rlvr_credit.summed(np.zeros(len(lengths), np.float32), scored.advantages)
    values = values if values.ndim == 2 else np.repeat(values[:, None], lengths.max(), axis=1)
    for row, length in enumerate(lengths):
        for token in range(length):
            caption, cot = normalised["caption"][row], normalised["cot"][row]
            if not is_ok[row]:
                wanted = 0.5 * caption + 0.5 * cot
            elif token < 1:
                wanted = factor * caption + shared * cot
            else:
                wanted = (0.5 if credit == "response" else 0.0) * caption + factor * cot
            assert values[row, token] == pytest.approx(3 * wanted, abs=2e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with rl_run.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield rl_run.write(tmp_path_factory.mktemp("adversary"))


def _run(folder, workdir, *overrides):
    arguments = rl_run.arguments(
        "rlvr",
        folder,
        workdir,
        f"--config.adversary.discriminator.folder={folder / 'tok'}",
        *rl_run.sizes("adversary.discriminator"),
        "--config.adversary.decay_steps=2",
        "--config.adversary.discriminator.lengths.is_fitted=True",
        "--config.advantage.credit=segment",
        "--config.train.num_steps=4",
        "--config.rollout.max_response_tokens=96",
        "--config.rollout.num_responses=4",
        "--config.checkpoint.save_every_steps=1",
        *overrides,
    )
    arguments[1] = "--config=configs/rlvr.py:tiny,new,adversary"
    own = str(folder / "corpus" / "rl" / "train.parquet")
    other = str(folder / "corpus" / "align" / "train.parquet")
    with align_run.scripted(folder / "tok"):
        return rl_run.run_arguments([x.replace(own, other) for x in arguments])


def test_a_run_scores_and_updates_its_discriminator_until_the_coefficient_is_zero(folder, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert _run(folder, whole) == 0
    rows = rl_run.rows(whole)
    assert [row["reward/adversarial_coefficient"] for row in rows] == [1.0, 0.5, 0.0, 0.0]
    for row in rows:
        is_asked = row["step"] < 3
        assert ("discriminator/caption_gap" in row) == is_asked
        assert ("discriminator/cot_length_slope" in row) == is_asked
        assert ("optim/discriminator_grad_norm" in row) == is_asked
    sums = [sft_run.checksums(whole)[f"{name}.params"] for name in ("policy", "discriminator")]
    assert all(sums)
    write = metric_writers.JsonLines.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric_writers.JsonLines, "write", write_and_stop)
        assert _run(folder, cut) == 143
    assert _run(folder, cut) == 0
    assert sft_run.checksums(cut) == sft_run.checksums(whole)
    assert rl_run.rows(cut) == rows


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"end_coefficient": None}, "end_coefficient and decay_steps: both or none"),
        ({"updates": 0}, "updates must be >= 1"),
        ({"cot_weight": None}, "must have a weight for each of caption, cot"),
        ({"discriminator.steadying.ema_decay": 0.9}, "must be None in rlvr"),
        ({"discriminator.microbatch_pairs": 2}, "microbatch_pairs must be None in rlvr"),
    ],
)
def test_what_does_not_fit_is_refused(changes, told):
    with pytest.raises(errors.InputError, match=told):
        _adversary(**changes)


def test_credit_needs_a_view_with_parts():
    config = config_file.get_config("tiny,adversary")
    config.model.folder, config.prompts.path = "x", ("x",)
    config.adversary.discriminator.folder = "x"
    config.adversary.discriminator.view = "whole"
    config.adversary.caption_weight = config.adversary.cot_weight = None
    config.adversary.response_weight = 1.0
    assert configuration.parse(rlvr_config.Config, config).adversary.weights == {"response": 1.0}
    config.advantage.credit = "segment"
    with pytest.raises(errors.InputError, match="for an adversary whose view has no parts"):
        configuration.parse(rlvr_config.Config, config)
