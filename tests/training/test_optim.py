import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from prism_jax import errors, tree_paths
from prism_jax.training import optim, optim_kinds, schedules, train_state
from tests import toy_run


@functools.cache
def _params():
    return jax.jit(lambda: train_state.split_model(toy_run.Toy(nnx.Rngs(0)))[1])()


def _schedule(kind="cosine", **changes):
    arguments = {
        "peak": 2.0,
        "num_steps": 20,
        "warmup_steps": 4,
        "warmup_fraction": None,
        "end_factor": 1.0 if kind == "constant" else 0.0,
    }
    return schedules.learning_rate_schedule(kind, **(arguments | changes))


def _jitted(optimizer):
    @jax.jit
    def update(grads, opt_state, trainable, step, flags):
        told = optimizer.update(grads, opt_state, trainable, step=step, key=None, **flags)
        return told[0], told[1], dataclasses.asdict(told[2])

    def run(grads, opt_state, trainable, *, step=5, is_finite=True, is_empty=False):
        flags = {"is_finite": is_finite, "is_empty": is_empty}
        trainable, opt_state, told = update(grads, opt_state, trainable, step, flags)
        return trainable, opt_state, optim.Update(**told)

    return run


def _leaves(tree):
    return tree_paths.named_leaves(tree)


def test_adamw_equals_optax_adamw_with_clipping():
    params = _params()
    optimizer = toy_run.make_optimizer(params, no_decay=())
    update = _jitted(optimizer)
    peer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optimizer.schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1),
    )
    opt_state, peer_state, peer_params = optimizer.init(params), peer.init(params), params
    for step in range(5):
        grads = jax.tree.map(lambda p, s=step: np.sin(np.asarray(p) * (s + 1)) * 3, params)
        params, opt_state, _ = update(grads, opt_state, params, step=step)
        changes, peer_state = jax.jit(peer.update)(grads, peer_state, peer_params)
        peer_params = optax.apply_updates(peer_params, changes)
    for name, leaf in _leaves(params).items():
        np.testing.assert_allclose(leaf, _leaves(peer_params)[name], rtol=1e-6, atol=1e-7)


def test_no_decay_leaves_parameters_without_gradient_alone():
    params = jax.tree.map(np.ones_like, _params())
    optimizer = toy_run.make_optimizer(params, no_decay=("bias",), weight_decay=0.1)
    update = _jitted(optimizer)
    zeros = jax.tree.map(np.zeros_like, params)
    after, _, _ = update(zeros, optimizer.init(params), params)
    np.testing.assert_array_equal(_leaves(after)["bias"], 1.0)
    # One step of pure decay: 1 - learning rate * weight decay = 1 - 0.01 * 0.1.
    np.testing.assert_allclose(_leaves(after)["kernel"], 0.999, rtol=1e-6)


def test_factor_of_a_group_scales_its_learning_rate():
    params = _params()
    ones = jax.tree.map(np.ones_like, params)
    groups = (("kernel", 0.5), (".*", 1.0))
    optimizer = toy_run.make_optimizer(params, groups=groups, weight_decay=0.0)
    update = _jitted(optimizer)
    after, _, _ = update(ones, optimizer.init(params), params)
    # Adam's first step is the learning rate times the sign of the gradient.
    before = _leaves(params)
    np.testing.assert_allclose(before["kernel"] - _leaves(after)["kernel"], 0.005, rtol=1e-3)
    np.testing.assert_allclose(before["head"] - _leaves(after)["head"], 0.01, rtol=1e-3)


def test_frozen_parameters_have_no_optimizer_state():
    params = _params()
    optimizer = toy_run.make_optimizer(params, groups=(("head", None), (".*", 1.0)))
    trainable, frozen = optimizer.split(params)
    assert sorted(_leaves(frozen)) == ["head"]
    assert sorted(_leaves(trainable)) == ["bias", "kernel"]
    moments = optimizer.init(trainable).inner["plain"]
    assert sorted(_leaves(moments.mu)) == sorted(_leaves(moments.nu)) == ["bias", "kernel"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((("kernel", 1.0),), "no group matches bias, head"),
        (((".*", 1.0), ("vision/.*", None)), "'vision/.*' matches no parameter"),
        (((".*", 1.0), ("head", None)), "'head' decides nothing"),
        (((".*", None),), "every parameter is frozen"),
        ((("(", 1.0),), "not a regular expression"),
        (((".*", 0.0),), "must be > 0"),
    ],
)
def test_groups_that_do_not_fit_the_parameters_raise(groups, message):
    with pytest.raises(errors.InputError, match=message.replace(".*'", r"\.\*'")):
        toy_run.make_optimizer(_params(), groups=groups)


def test_no_decay_pattern_that_matches_nothing_raises():
    with pytest.raises(errors.InputError, match=r"optim.no_decay: 'norm' matches no parameter"):
        toy_run.make_optimizer(_params(), no_decay=("norm",))


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_steps_that_are_not_finite_change_nothing_but_the_counts(kind):
    params = _params()
    optimizer = toy_run.make_optimizer(params)
    update = _jitted(optimizer)
    good = jax.tree.map(np.ones_like, params)
    bad = good if kind == "loss" else jax.tree.map(lambda p: np.full_like(p, np.nan), good)
    params, opt_state, told = update(good, optimizer.init(params), params)
    assert bool(told.is_taken)
    before = _leaves((params, opt_state.inner))
    for count in range(1, 6):
        params, opt_state, told = update(bad, opt_state, params, is_finite=kind == "gradient")
        assert not bool(told.is_taken)
        assert int(opt_state.num_skipped_in_row) == count
    after = _leaves((params, opt_state.inner))
    for name, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[name])
    # An empty step in between moves nothing either, and neither counts nor forgives a skip.
    zeros = jax.tree.map(np.zeros_like, params)
    params, opt_state, told = update(zeros, opt_state, params, is_empty=True)
    assert bool(told.is_empty) and not bool(told.is_taken)
    assert int(opt_state.num_skipped_in_row) == int(opt_state.num_skipped) == 5
    after = _leaves((params, opt_state.inner))
    for name, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[name])
    params, opt_state, told = update(bad, opt_state, params, is_finite=False, is_empty=True)
    assert not bool(told.is_empty) and int(opt_state.num_skipped) == 6
    params, opt_state, told = update(good, opt_state, params)
    assert bool(told.is_taken)
    assert int(opt_state.num_skipped) == 6
    assert int(opt_state.num_skipped_in_row) == 0


def test_storage_dtypes_are_kept_through_updates():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), _params())
    numbers = optim_kinds.Numbers(
        b1=0.9, b2=0.95, eps=1e-8, mu_dtype="bfloat16", nu_dtype="float32"
    )
    optimizer = toy_run.make_optimizer(params, numbers=numbers)
    update = _jitted(optimizer)
    grads = jax.tree.map(np.ones_like, params)
    params, opt_state, _ = update(grads, optimizer.init(params), params)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(opt_state.inner["plain"].mu)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(opt_state.inner["plain"].nu)} == {"float32"}


def test_gradient_norm_is_reported_before_clipping():
    params = _params()
    optimizer = toy_run.make_optimizer(params, clip_norm=0.5)
    update = _jitted(optimizer)
    grads = jax.tree.map(np.ones_like, params)  # 32 + 8 + 8 ones
    _, opt_state, told = update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(told.grad_norm, 48**0.5, rtol=1e-6)
    assert bool(told.is_clipped)
    first = _leaves(opt_state.inner["plain"].mu)["bias"]
    np.testing.assert_allclose(first, 0.1 * 0.5 / 48**0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("constant", 0, 0.0),
        ("constant", 1, 0.5),
        ("constant", 4, 2.0),
        ("constant", 19, 2.0),
        ("linear", 12, 1.0),
        ("linear", 20, 0.0),
        ("cosine", 2, 1.0),
        ("cosine", 4, 2.0),
        ("cosine", 8, 1.0 + 2**-0.5),  # a quarter of the way: cos(pi / 4)
        ("cosine", 12, 1.0),
        ("cosine", 20, 0.0),
        ("cosine", 30, 0.0),
    ],
)
def test_schedule_has_the_value_worked_out_by_hand(kind, step, expected):
    np.testing.assert_allclose(_schedule(kind)(jnp.int32(step)), expected, atol=1e-6)


def test_warmup_fraction_is_rounded_up_to_steps():
    by_fraction = _schedule(warmup_steps=None, warmup_fraction=0.16)  # 3.2 steps of 20
    by_steps = _schedule(warmup_steps=4)
    assert [float(by_fraction(s)) for s in range(20)] == [float(by_steps(s)) for s in range(20)]


def test_end_factor_is_where_the_schedule_ends():
    schedule = _schedule("linear", end_factor=0.1)
    np.testing.assert_allclose(schedule(20), 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"warmup_fraction": 0.1},
        {"warmup_steps": None},
        {"warmup_steps": 21},
        {"kind": "triangle"},
        {"kind": "constant", "end_factor": 0.5},
    ],
)
def test_schedules_that_contradict_themselves_raise(changes):
    with pytest.raises(errors.InputError, match="optim\\."):
        _schedule(**changes)
