import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prism_jax import batches, metrics, tree_paths
from prism_jax.training import train_state, train_step
from tests import toy_run

KEY = jax.random.key(0)


def _make_step(graphdef, optimizer, **changes):
    arguments = {
        "weights_fn": toy_run.weights_fn,
        "coefficients": {"token": 1.0, "row": 0.1},
        "shardings": None,
    }
    return train_step.make_train_step(graphdef, toy_run.loss_fn, optimizer, **(arguments | changes))


def _step_once(batch, *, num_microbatches, **optimizer_changes):
    _, make_state, step = toy_run.setup(num_microbatches=num_microbatches, **optimizer_changes)
    state, logged = step(make_state(), batches.split(batch, num_microbatches), KEY)
    return state, metrics.read(logged)


@functools.cache
def _mean_gradient():
    """Differentiate the loss written as means over the whole batch, without sums or splits."""
    batch = toy_run.make_batch(0, num_rows=8)
    graphdef, _ = train_state.abstract_params(toy_run.Toy, param_dtype=None)
    params = toy_run.setup()[1]().params

    def loss(params):
        errors = (nnx.merge(graphdef, params)(batch["x"]) - batch["y"]) ** 2
        by_token = jnp.mean(errors, where=batch["mask"])
        by_row = jnp.mean(jnp.mean(errors, axis=-1, where=batch["mask"]))
        return by_token + 0.1 * by_row

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))


@pytest.mark.parametrize("num_microbatches", [1, 2, 4, 8])
def test_any_split_gives_the_gradient_of_the_whole_batch_with_unequal_lengths(num_microbatches):
    batch = toy_run.make_batch(0, num_rows=8)
    assert len(set(batch["mask"].sum(-1))) > 2
    state, logged = _step_once(batch, num_microbatches=num_microbatches, clip_norm=None)
    loss, grads = _mean_gradient()
    np.testing.assert_allclose(logged["loss/total"], loss, rtol=1e-6)
    # After one step Adam's first moment is (1 - b1) times the gradient.
    for name, moment in tree_paths.named_leaves(state.opt_state.inner["plain"].mu).items():
        expected = np.asarray(tree_paths.named_leaves(grads)[name])
        error = np.linalg.norm(np.asarray(moment) / np.float32(0.1) - expected)
        assert error <= 1e-6 * np.linalg.norm(expected), name


def test_metrics_of_microbatches_are_merged_by_their_weights():
    batch = toy_run.make_batch(0, num_rows=8)
    _, whole = _step_once(batch, num_microbatches=1, clip_norm=None)
    _, split = _step_once(batch, num_microbatches=8, clip_norm=None)
    assert whole.keys() == split.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(split[name], value, rtol=1e-6, err_msg=name)


def test_rows_without_a_kept_token_add_nothing_and_no_nan():
    batch = toy_run.make_batch(0, num_rows=8)
    batch["mask"] = np.zeros_like(batch["mask"])
    state, logged = _step_once(batch, num_microbatches=4, clip_norm=None)
    assert logged["loss/total"] == 0.0
    assert logged["optim/grad_norm"] == 0.0
    assert logged["optim/skipped_updates"] == 0.0
    assert "loss/token" not in logged
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_step_whose_terms_have_no_weight_leaves_parameters_and_momentum_bit_equal():
    graphdef, params = train_state.abstract_params(toy_run.Toy, param_dtype=jnp.float32)
    # The rows of the other term have weight, but the term itself has no part in the loss.
    factors = {"token": 1.0, "row": 0.0}
    step = _make_step(
        graphdef, toy_run.make_optimizer(params), num_microbatches=2, coefficients=factors
    )
    good = batches.split(toy_run.make_batch(0, num_rows=8), 2)
    empty = good | {"mask": np.zeros_like(good["mask"])}
    state = toy_run.setup(num_microbatches=2)[1]()
    for _ in range(3):
        state, logged = step(state, good, KEY)
        assert metrics.read(logged)["optim/empty_updates"] == 0
    before = jax.device_get(state)
    for _ in range(2):
        state, logged = step(state, empty, KEY)
        logged = metrics.read(logged)
        assert logged["optim/empty_updates"] == 1
        assert logged["optim/skipped_updates"] == logged["optim/skipped_in_row"] == 0
    assert int(state.step) == 5
    kept = tree_paths.named_leaves((state.params, state.opt_state))
    for name, leaf in tree_paths.named_leaves((before.params, before.opt_state)).items():
        np.testing.assert_array_equal(leaf, kept[name], err_msg=name)


def test_a_loss_that_measures_nothing_learns_from_several_microbatches():
    graphdef, params = train_state.abstract_params(toy_run.Toy, param_dtype=jnp.float32)
    silent = train_step.make_train_step(
        graphdef,
        lambda model, batch, key: (toy_run.loss_fn(model, batch, key)[0], {}),
        toy_run.make_optimizer(params),
        weights_fn=toy_run.weights_fn,
        coefficients={"token": 1.0, "row": 0.1},
        num_microbatches=2,
        shardings=None,
    )
    batch = toy_run.make_batch(0, num_rows=8)
    _, make_state, _ = toy_run.setup(num_microbatches=2)
    _, logged = silent(make_state(), batches.split(batch, 2), KEY)
    _, expected = _step_once(batch, num_microbatches=2)
    assert metrics.read(logged)["loss/total"] == expected["loss/total"]


def test_three_steps_compile_once_and_donate_the_state():
    _, make_state, step = toy_run.setup(num_microbatches=2)
    state = first = make_state()
    for index in range(3):
        batch = batches.split(toy_run.make_batch(index, num_rows=8), 2)
        state, _ = step(state, batch, jax.random.fold_in(KEY, index))
    assert step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert int(state.step) == 3


def test_a_batch_with_nan_is_skipped_and_counted():
    _, make_state, step = toy_run.setup(num_microbatches=2)
    good = batches.split(toy_run.make_batch(0, num_rows=8), 2)
    bad = good | {"x": np.full_like(good["x"], np.nan)}
    state, _ = step(make_state(), good, KEY)
    before = jax.device_get(state)
    counts = []
    for _ in range(2):
        state, logged = step(state, bad, KEY)
        counts.append(metrics.read(logged)["optim/skipped_in_row"])
    assert counts == [1, 2]
    assert int(state.step) == 3
    for name, leaf in tree_paths.named_leaves(before.params).items():
        np.testing.assert_array_equal(leaf, tree_paths.named_leaves(state.params)[name])
    state, logged = step(state, good, KEY)
    assert metrics.read(logged)["optim/skipped_in_row"] == 0
    assert metrics.read(logged)["optim/skipped_updates"] == 2


def test_frozen_parameters_keep_their_bits_and_are_not_differentiated():
    differentiated = []

    def watch(name, x):
        watched = jax.custom_vjp(lambda x: x)
        watched.defvjp(lambda x: (x, None), lambda _, g: (differentiated.append(name) or g,))
        return watched(x)

    class Watched(toy_run.Toy):
        def __call__(self, x):
            hidden = jnp.tanh(x @ watch("kernel", self.kernel[...]) + self.bias[...])
            return (hidden @ watch("head", self.head[...]))[..., 0]

    graphdef, params = train_state.abstract_params(Watched, param_dtype=None)
    optimizer = toy_run.make_optimizer(params, groups=(("kernel", None), (".*", 1.0)))
    step = _make_step(graphdef, optimizer, num_microbatches=1)
    state = train_state.init(Watched, optimizer, KEY, param_dtype=None, shardings=None)
    before = jax.device_get(state.params)
    state, _ = step(state, batches.split(toy_run.make_batch(0, num_rows=8), 1), KEY)
    state, _ = step(state, batches.split(toy_run.make_batch(1, num_rows=8), 1), KEY)
    np.testing.assert_array_equal(before["kernel"][...], state.params["kernel"][...])
    assert np.any(before["head"][...] != np.asarray(state.params["head"][...]))
    assert set(differentiated) == {"head"}


def test_eight_devices_give_the_step_of_one():
    batch = toy_run.make_batch(0, num_rows=16)
    alone, told_alone = _step_once(batch, num_microbatches=2, clip_norm=None)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    graphdef, params = train_state.abstract_params(toy_run.Toy, param_dtype=jnp.float32)
    optimizer = toy_run.make_optimizer(params, clip_norm=None)

    def sharding(leaf):
        spec = ("fsdp",) if leaf.ndim and leaf.shape[0] % 4 == 0 else ()
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree.map(sharding, train_state.abstract_state(params, optimizer))
    step = _make_step(graphdef, optimizer, num_microbatches=2, shardings=shardings)
    state = train_state.init(
        toy_run.Toy, optimizer, KEY, param_dtype=jnp.float32, shardings=shardings
    )
    rows = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
    state, logged = step(state, jax.device_put(batches.split(batch, 2), rows), KEY)
    np.testing.assert_allclose(
        metrics.read(logged)["loss/total"], told_alone["loss/total"], rtol=1e-6
    )
    moments = tree_paths.named_leaves(state.opt_state.inner["plain"].mu)
    for name, expected in tree_paths.named_leaves(alone.opt_state.inner["plain"].mu).items():
        np.testing.assert_allclose(moments[name], expected, rtol=1e-5, atol=1e-7)
    assert state.params["kernel"][...].sharding.spec == PartitionSpec("fsdp")


def test_a_batch_of_another_number_of_microbatches_is_refused():
    _, make_state, step = toy_run.setup(num_microbatches=2)
    batch = batches.split(toy_run.make_batch(0, num_rows=8), 4)
    with pytest.raises(ValueError, match=r"num_microbatches=2.*\(4, 2, 6\)"):
        step(make_state(), batch, KEY)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="6 rows do not divide into num_microbatches=4"):
        batches.split(toy_run.make_batch(0, num_rows=6), 4)


def test_terms_without_a_coefficient_are_refused():
    graphdef, params = train_state.abstract_params(toy_run.Toy, param_dtype=None)
    optimizer = toy_run.make_optimizer(params)
    step = _make_step(graphdef, optimizer, num_microbatches=1, coefficients={"token": 1.0})
    state = train_state.init(toy_run.Toy, optimizer, KEY, param_dtype=None, shardings=None)
    with pytest.raises(ValueError, match=r"\['row', 'token'\], coefficients has \['token'\]"):
        step(state, batches.split(toy_run.make_batch(0, num_rows=8), 1), KEY)


def test_compiler_options_reach_the_compiler_and_leave_the_step_alone():
    graphdef, params = train_state.abstract_params(toy_run.Toy, param_dtype=None)
    optimizer = toy_run.make_optimizer(params)
    batch = batches.split(toy_run.make_batch(0, num_rows=4), 1)

    def loss_with(options):
        step = _make_step(graphdef, optimizer, num_microbatches=1, compiler_options=options)
        state = train_state.init(toy_run.Toy, optimizer, KEY, param_dtype=None, shardings=None)
        return metrics.read(step(state, batch, KEY)[1])["loss/total"]

    options = {"xla_cpu_enable_fast_math": False, "xla_gpu_autotune_level": 0}
    np.testing.assert_allclose(loss_with(options), loss_with(None), rtol=1e-6)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        loss_with({"no_such_option": True})
