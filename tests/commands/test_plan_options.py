"""`plan`: the passes and the states that options of a stage add."""

import math

import pytest

from prism_jax.commands.plan import memory, opening
from tests.commands import planned


def test_several_updates_and_a_reference_are_counted():
    changes = {"train.num_epochs": 2, "reference.loss_coefficient": 0.1}
    plan = planned.estimate("rlvr", "4b", "v5p:2x2x2", **changes)
    assert [phase.name for phase in plan.phases] == ["prefill", "decode", "log-probs", "update"]
    update = plan.phases[-1]
    assert update.beside["reference"] == pytest.approx(update.parts["parameters"])
    once = planned.estimate("rlvr", "4b", "v5p:2x2x2")
    assert [phase.name for phase in once.phases] == ["prefill", "decode", "update"]
    assert plan.steps_an_hour < once.steps_an_hour


def _phases(plan) -> dict:
    return {phase.name: phase for phase in plan.phases}


def _works(plan) -> dict:
    return {program.phase: program.work for program in plan.opened.programs}


def test_a_mean_of_weights_and_a_penalty_are_counted():
    steadying = "discriminator.steadying"
    mean = {f"{steadying}.ema_decay": 0.99}
    penalty = {f"{steadying}.gradient_penalty": 0.1, f"{steadying}.penalty_noise": 0.01}
    plain, with_mean, with_penalty = (
        planned.estimate("align", "4b", "v5p:2x2x2", **changes) for changes in ({}, mean, penalty)
    )
    weights = _phases(plain)["scores"].parts["discriminator parameters"]
    assert _phases(with_mean).keys() - _phases(plain).keys() == {"scores of the mean"}
    for phase in with_mean.phases:
        # Both are float32 and lie there all the time, in the rollout too.
        assert {**phase.parts, **phase.beside}["mean parameters"] == pytest.approx(weights)
    assert with_mean.steps_an_hour < plain.steps_an_hour
    name = "discriminator's update"
    once, twice = (_phases(plan)[name].temporary for plan in (plain, with_penalty))
    # The inputs of all layers again; gradients and the widest layer once.
    text, work = opening.MODELS["discriminator"].text, _works(plain)[name]
    saved = text.num_layers * text.hidden_size * 2 * work.tokens / 8
    assert twice - once >= memory.ESTIMATE_FACTOR * saved / memory.GIB
    assert twice < 2 * once
    assert with_penalty.steps_an_hour < plain.steps_an_hour


def test_replayed_prompts_and_other_pictures_are_more_rows_of_the_discriminator():
    steadying, lengths = "discriminator.steadying", "discriminator.lengths"
    more = [
        {f"{steadying}.replay_prompts": 4, f"{steadying}.replay_steps": 2},
        {f"{lengths}.swap_coefficient": 0.1},
    ]
    works = [
        _works(
            planned.estimate(
                *("align", "4b", "v5p:2x2x2"),
                **{"discriminator.rows.has_shared_prompts": False},
                **changes,
            )
        )
        for changes in ({}, *more)
    ]
    # Caption and cot of the teacher and of 16 responses to 4 prompts, a segment a row, 8 rows at a
    # time; 4 earlier prompts with their responses; the teacher's captions behind other pictures.
    segments = 2 * 4 * 17
    calls = [math.ceil(count / 8) for count in (segments, 2 * segments, segments + 4)]
    for phase in ("scores", "discriminator's update"):
        assert [one[phase].calls for one in works] == calls
    assert len({one["policy's update"].calls for one in works}) == 1


def test_an_adversary_and_an_open_teacher_in_rlvr_are_counted():
    changes = {"distill.folder": "8b", "distill.coefficient": 0.5}
    plan = planned.estimate("rlvr", "4b,adversary", "v5p:2x2x2", **changes)
    plain = planned.estimate("rlvr", "4b", "v5p:2x2x2")
    assert list(_phases(plan)) == [
        *("prefill", "decode", "scores", "discriminator's update", "update"),
    ]
    alone = planned.estimate("align", "4b", "v5p:2x2x2").phases[-1].beside
    teacher = planned.estimate("rlvr", "8b", "v5p:2x2x2").phases[-1].parts["parameters"]
    for phase in plan.phases:
        held = {**phase.parts, **phase.beside}
        for name in ("discriminator parameters", "discriminator states"):
            assert held[name] == pytest.approx(alone[name]), (phase.name, name)
        assert held["teacher"] == pytest.approx(teacher), phase.name
        for name in ("parameters", "states"):
            assert held[name] == pytest.approx(_phases(plain)["update"].parts[name])
    assert plan.steps_an_hour < plain.steps_an_hour
