"""White-box distillation: a teacher's log-probs on the policy's responses, token by token."""

import dataclasses

import jax
import numpy as np
import pytest

from prism_jax import errors
from prism_jax.policy import update as policy_update
from prism_jax.stages.rlvr import distill as rlvr_distill
from prism_jax.stages.rlvr import packing as rlvr_packing
from tests.stages import rl_toy

_TEACHER = 1.5 * rl_toy.first_table(seed=5) / rl_toy.first_table(seed=5).std()


def _run(name, **distill):
    """Return a run beside a teacher that is a table."""
    changes = {"rollout.num_responses": 8, "optim.peak": 0.2}
    if name == "dapo":
        changes["groups.max_generations"] = 3
    usual = {"folder": "none", "coefficient": 1.0}
    changes |= {f"distill.{field}": value for field, value in (usual | distill).items()}
    run = rl_toy.Run(rl_toy.options_of(name, changes))
    options = run.experience.options
    settings = policy_update.settings(
        options.train, options.rollout, options.model, rl_toy.devices()
    )
    teacher = rlvr_distill.Teacher(
        graphdef=run.model.graphdef, params=rl_toy._params_of(_TEACHER), fingerprint=""
    )
    distillation = rlvr_distill.make(options.distill, teacher, settings)
    run.experience = dataclasses.replace(run.experience, distill=distillation)
    return run


def _distance(table):
    """Return the mean KL(policy || teacher) of a token behind each prompt."""
    own, teacher = (rl_toy.log_softmax(x)[1:].astype(np.float64) for x in (table, _TEACHER))
    return float((np.exp(own) * (own - teacher)).sum(-1).mean())


@pytest.mark.parametrize("name", ["grpo", "dapo", "reinforce++"])
def test_a_policy_moves_to_its_teacher_with_every_kind_of_algorithm(name):
    run = _run(name, has_reward=False)
    before = _distance(run.table)
    run.take(20)
    assert _distance(run.table) < before / 3
    logged = [row["reward/teacher_kl"] for row in run.rows]
    assert np.mean(logged[-3:]) < np.mean(logged[:3]) / 2


def test_each_token_gets_the_teachers_log_prob_less_the_policys():
    run = _run("", coefficient=2.0)
    seen = {}
    finish = rlvr_packing.Packer.finish

    def spy(self, packed, responses, advantages):
        seen.update(responses=responses, advantages=advantages)
        return finish(self, packed, responses, advantages)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlvr_packing.Packer, "finish", spy)
        run.experience(run.state, next(run.feed), jax.random.key(0))
        plain = dataclasses.replace(run.experience, distill=None)
        both = seen.pop("advantages")
        responses = seen.pop("responses")
        rewarded = plain.comparison(
            responses.rewards, responses.prompt_id, responses.lengths, distance=None
        ).advantages
    own, teacher = rl_toy.log_softmax(run.table), rl_toy.log_softmax(_TEACHER)
    for row, response in enumerate(responses.responses):
        last = 1 + int(responses.prompt_id[row])
        for place, token in enumerate(response.tokens):
            wanted = rewarded[row] + 2.0 * (teacher[last, token] - own[last, token])
            assert both[row, place] == pytest.approx(wanted, abs=1e-4)
            last = int(token)


def test_a_coefficient_that_has_fallen_to_zero_leaves_the_algorithm_alone():
    plain = rl_toy.Run(rl_toy.options_of("", {"rollout.num_responses": 8, "optim.peak": 0.2})).take(
        2
    )
    none = _run("", coefficient=0.0).take(2)
    np.testing.assert_array_equal(none.table, plain.table)
    falling = _run("", coefficient=1.0, end_coefficient=0.0, decay_steps=2).take(3)
    assert [row["reward/distill_coefficient"] for row in falling.rows] == [1.0, 0.5, 0.0]
    assert ["reward/teacher_kl" in row for row in falling.rows] == [True, True, False]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"folder": "x"}, "coefficient must be given exactly with folder"),
        ({"coefficient": 1.0}, "coefficient must be given exactly with folder"),
        ({"has_reward": False}, "has_reward must be True without folder"),
        ({"end_coefficient": 0.0}, "end_coefficient and decay_steps: both or none"),
    ],
)
def test_what_does_not_fit_is_refused(changes, told):
    with pytest.raises(errors.InputError, match=told):
        rl_toy.options_of("", {f"distill.{name}": value for name, value in changes.items()})


def test_without_a_folder_nothing_is_loaded():
    options = rl_toy.options_of("", {}).distill
    assert rlvr_distill.open_teacher(options, None, None, None) is None
    assert rlvr_distill.make(options, None, None) is None
