"""White-box distillation: a teacher on the policy's responses, in the updates of RLVR."""

import dataclasses

import jax
import numpy as np
import pytest

from prism_jax import errors
from prism_jax.training import train_step
from tests.stages import rl_toy

_TEACHER = 1.5 * rl_toy.first_table(seed=5) / rl_toy.first_table(seed=5).std()


def _run(name, **distill):
    """Return a run beside a teacher that is a table."""
    changes = {"rollout.num_responses": 8, "optim.peak": 0.2}
    if name == "dapo":
        changes["groups.max_generations"] = 3
    usual = {"folder": "none", "coefficient": 1.0}
    changes |= {f"distill.{field}": value for field, value in (usual | distill).items()}
    return rl_toy.Run(rl_toy.options_of(name, changes), teacher=_TEACHER)


def _distance(table):
    """Return the mean KL(policy || teacher) of a token behind each prompt."""
    own, teacher = (rl_toy.log_softmax(x)[1:].astype(np.float64) for x in (table, _TEACHER))
    return float((np.exp(own) * (own - teacher)).sum(-1).mean())


@pytest.mark.parametrize(
    ("name", "distill"),
    [
        ("grpo", {}),
        ("dapo", {}),
        ("reinforce++", {}),
        ("grpo", {"kind": "forward"}),
        ("dapo", {"kind": "reverse"}),
        ("gspo", {"kind": "jsd", "teacher_share": 0.5}),
    ],
)
def test_a_policy_moves_to_its_teacher_by_every_kind_beside_any_algorithm(name, distill):
    run = _run(name, has_reward=False, **distill)
    before = _distance(run.table)
    run.take(20)
    assert _distance(run.table) < before / 3
    logged = [row["policy/teacher_kl"] for row in run.rows]
    assert np.mean(logged[-3:]) < np.mean(logged[:3]) / 2


def _batches(run, *, has_teacher):
    """Return the batches of a first step, the same with a teacher and without."""
    experience = run.experience
    if not has_teacher:
        experience = dataclasses.replace(experience, distill=None)
    return experience(run.state, next(run.feed), jax.random.key(0))[0]


def test_the_teacher_comes_beside_the_same_rewards_and_in_place_of_them():
    plain = _batches(_run(""), has_teacher=False)
    (taught,) = _batches(_run(""), has_teacher=True)
    assert isinstance(taught, train_step.WithShared)
    assert float(taught.shared.coefficient) == 1.0
    np.testing.assert_array_equal(taught.rows.advantages, plain[0].advantages)
    assert np.any(plain[0].advantages)
    (alone,) = _batches(_run("", has_reward=False), has_teacher=True)
    assert not np.any(alone.rows.advantages)


@pytest.mark.parametrize("kind", ["k1", "reverse"])
def test_several_updates_of_a_rollout_have_the_teacher_in_each(kind):
    changes = {"rollout.num_responses": 8, "optim.peak": 0.2, "train.num_epochs": 2}
    changes |= {"distill.folder": "none", "distill.coefficient": 1.0, "distill.kind": kind}
    changes |= {"distill.has_reward": False}
    run = rl_toy.Run(rl_toy.options_of("", changes), teacher=_TEACHER)
    before = _distance(run.table)
    run.take(10)
    assert _distance(run.table) < before / 3


def test_a_coefficient_that_has_fallen_to_zero_leaves_the_algorithm_alone():
    plain = rl_toy.Run(rl_toy.options_of("", {"rollout.num_responses": 8, "optim.peak": 0.2})).take(
        2
    )
    for kind in ("k1", "reverse"):
        none = _run("", coefficient=0.0, kind=kind).take(2)
        np.testing.assert_allclose(none.table, plain.table, rtol=1e-6)
        falling = _run("", coefficient=1.0, end_coefficient=0.0, decay_steps=2, kind=kind).take(3)
        assert [row["policy/teacher_coefficient"] for row in falling.rows] == [1.0, 0.5, 0.0]
        assert ["policy/teacher_kl" in row for row in falling.rows] == [True, True, False]
        # The teacher comes and goes in one program.
        assert falling.update.args[0]._cache_size() == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"folder": "x"}, "coefficient must be given exactly with folder"),
        ({"coefficient": 1.0}, "coefficient must be given exactly with folder"),
        ({"has_reward": False}, "has_reward must be True without folder"),
        ({"end_coefficient": 0.0}, "end_coefficient and decay_steps: both or none"),
        ({"kind": "jsd"}, "teacher_share must be given for jsd and be None .* None for jsd"),
        ({"teacher_share": 0.5}, "teacher_share must be .* got 0.5 for k1"),
        ({"kind": "jsd", "teacher_share": 1.0}, r"teacher_share must be in \(0, 1\), got 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(changes, told):
    with pytest.raises(errors.InputError, match=told):
        rl_toy.options_of("", {f"distill.{name}": value for name, value in changes.items()})
