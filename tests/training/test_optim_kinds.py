"""Kinds of optimizers on stacked layers: equal to Optax layer by layer, in place, streamed."""

import dataclasses
import functools
import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prism_jax import batches, configuration, metrics
from prism_jax.losses import reduce
from prism_jax.training import optim, optim_kinds, train_state, train_step
from tests import toy_run

_LAYERS, _WIDTH = 3, 128
_NUMBERS = {
    "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "mu_dtype": "float32", "nu_dtype": "float32"},
    "muon": {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "mu_dtype": "float32", "nu_dtype": "float32"},
    "lion": {"b1": 0.9, "b2": 0.99, "mu_dtype": "float32"},
    "adafactor": {"eps": 1e-30},
    "adafactor_momentum": {"eps": 1e-30, "b1": 0.9, "mu_dtype": "float32"},
}


def _numbers(kind, **changes):
    given = dict.fromkeys(f.name for f in dataclasses.fields(optim_kinds.Numbers))
    return optim_kinds.Numbers(**(given | _NUMBERS[kind] | changes))


class Stacked(nnx.Module):
    """A table, a stack of square maps with scales, walked over by a scan, and a bias."""

    def __init__(self, rngs: nnx.Rngs, num_layers: int = _LAYERS, width: int = _WIDTH):
        def normal(*shape):
            return jax.random.normal(rngs.params(), shape) * 0.1

        self.table = nnx.Param(normal(16, width), axes=("vocab", "embed"))
        axes = ("layers", "embed", "mlp")
        self.kernel = nnx.Param(normal(num_layers, width, width), axes=axes)
        self.scale = nnx.Param(jnp.ones((num_layers, width)), axes=("layers", "norm"))
        self.bias = nnx.Param(jnp.zeros(width), axes=("norm",))

    def __call__(self, tokens):
        def layer(x, params):
            kernel, scale = (p.astype(x.dtype) for p in params)
            return x + jnp.tanh(x * scale @ kernel), None

        x = self.table[...].astype(jnp.float32)[tokens]
        layers = (self.kernel[...], self.scale[...])
        return jax.lax.scan(layer, x, layers)[0] + self.bias[...].astype(jnp.float32)


def _loss_fn(model, batch, key):
    del key
    errors = (model(batch["tokens"]).mean(-1) - batch["y"]) ** 2
    return {"error": reduce.Sum(total=errors.sum(), weight=jnp.float32(errors.size))}, {}


def _make_optimizer(params, kind="adamw", numbers=None, **changes):
    return toy_run.make_optimizer(
        params,
        **{
            "kind": kind.partition("_")[0],
            "numbers": numbers or _numbers(kind),
            "no_decay": (".*scale", ".*bias"),
        }
        | changes,
    )


def _setup(
    kind,
    *,
    num_microbatches=1,
    param_dtype=jnp.float32,
    make_shardings=None,
    width=_WIDTH,
    num_layers=_LAYERS,
    **changes,
):
    make = functools.partial(Stacked, width=width, num_layers=num_layers)
    graphdef, params = train_state.abstract_params(make, param_dtype=param_dtype)
    optimizer = _make_optimizer(params, kind, **changes)
    shardings = None
    if make_shardings is not None:
        shardings = make_shardings(train_state.abstract_state(params, optimizer))
    state = train_state.init(
        make, optimizer, jax.random.key(0), param_dtype=param_dtype, shardings=shardings
    )
    step = train_step.make_train_step(
        graphdef,
        _loss_fn,
        optimizer,
        weights_fn=lambda batch: {"error": jnp.float32(batch["y"].size)},
        coefficients={"error": 1.0},
        num_microbatches=num_microbatches,
        shardings=shardings,
    )
    return state, step


def _batch(number, num_microbatches=1):
    rng = np.random.default_rng(number)
    batch = {"tokens": rng.integers(0, 16, 8), "y": rng.standard_normal(8).astype(np.float32)}
    return batches.split(batch, num_microbatches)


def _run(state, step, num_steps=3, **batch_changes):
    for number in range(num_steps):
        batch = _batch(number, **batch_changes)
        state, told = step(state, batch, jax.random.fold_in(jax.random.key(7), number))
    return state, metrics.read(told)


def _peer(kind):
    """Return Optax's own optimizer of one layer."""
    numbers = _numbers(kind)
    if kind == "adamw":
        return optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8)
    if kind == "lion":
        return optax.scale_by_lion(b1=0.9, b2=0.99)
    if kind == "muon":
        return optax.contrib.muon(
            -1.0, beta=0.9, adam_b1=0.9, adam_b2=0.95, eps=1e-8, consistent_rms=0.2
        )
    return optax.chain(
        optax.adafactor(multiply_by_parameter_scale=False, momentum=numbers.b1, eps=1e-30),
        optax.scale(-1.0),
    )


@pytest.mark.parametrize("kind", _NUMBERS)
def test_each_kind_moves_a_stack_as_optax_moves_each_layer(kind):
    params = train_state.split_model(Stacked(nnx.Rngs(0)))[1]
    optimizer = _make_optimizer(params, kind, weight_decay=0.0, clip_norm=None)
    state, peer = optimizer.init(params), _peer(kind)
    update = jax.jit(functools.partial(optimizer.update, is_empty=jnp.array(False), key=None))
    layers = [params["kernel"][...][i] for i in range(_LAYERS)]
    peer_states = [peer.init(layer) for layer in layers]
    for number in range(3):
        rate = optimizer.schedule(number + 1)
        grads = jax.tree.map(lambda p, n=number: jnp.sin(p * (n + 1) * 9), params)
        params, state, _ = update(
            grads, state, params, step=jnp.int32(number + 1), is_finite=jnp.array(True)
        )
        for i, layer in enumerate(layers):
            direction, peer_states[i] = peer.update(grads["kernel"][...][i], peer_states[i], layer)
            layers[i] = layer - rate * direction
    for i, layer in enumerate(layers):
        np.testing.assert_allclose(params["kernel"][...][i], layer, rtol=2e-5, atol=2e-6)
    # Muon leaves tables and vectors to Adam, whose first steps are about the learning rate.
    if kind == "muon":
        assert "adam" in state.inner["plain"].inner_states


def _on_mesh(num_devices):
    mesh = jax.make_mesh((num_devices,), ("fsdp",), axis_types=(AxisType.Auto,))

    def make_shardings(abstract):
        def of_params(params):
            def one(p):
                spec = ["fsdp" if axis == "embed" else None for axis in p.get_metadata("axes")]
                return p.replace(NamedSharding(mesh, PartitionSpec(*spec)))

            return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))

        return train_state.shardings(
            abstract, of_params=of_params, replicated=NamedSharding(mesh, PartitionSpec())
        )

    return make_shardings


@pytest.mark.parametrize(
    ("kind", "param_dtype", "rounding"),
    [("adamw", jnp.bfloat16, "stochastic"), ("muon", jnp.float32, "nearest")],
)
def test_states_streamed_from_the_host_give_the_same_steps(kind, param_dtype, rounding):
    numbers = _numbers(kind)
    if rounding == "stochastic":
        numbers = dataclasses.replace(numbers, mu_dtype="bfloat16", nu_dtype="bfloat16")
    told, found = {}, {}
    for memory in ("device", "host"):
        state, step = _setup(
            kind,
            numbers=numbers,
            param_dtype=param_dtype,
            rounding=rounding,
            memory=memory,
            make_shardings=_on_mesh(1),
        )
        first = state
        state, told[memory] = _run(state, step)
        found[memory] = state
        assert step._cache_size() == 1
        old = jax.tree.leaves((first.params, first.opt_state.inner))
        assert all(leaf.is_deleted() for leaf in old)
    # Two programs: a product and a sum may be one operation in one of them.
    tolerance = 1e-6 if param_dtype == jnp.float32 else 2.0**-7
    compare = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(
        lambda *leaves: compare(*(np.asarray(x, np.float32) for x in leaves)),
        found["device"].params,
        found["host"].params,
    )
    assert told["device"].keys() == told["host"].keys()
    assert int(found["host"].step) == 3
    layers = found["host"].opt_state.inner[f"layers_{_LAYERS}"]
    stacked = found["device"].opt_state.inner[f"layers_{_LAYERS}"]
    for number, layer in enumerate(layers):
        kept = jax.tree.leaves(layer)
        assert {leaf.sharding.memory_kind for leaf in kept} == {"pinned_host"}
        for one, whole in zip(kept, jax.tree.leaves(stacked), strict=True):
            compare(np.asarray(one, np.float32), np.asarray(whole[number], np.float32))


def _held_on_host():
    arrays = [x for x in jax.live_arrays() if x.sharding.memory_kind == "pinned_host"]
    return sum(x.nbytes for x in arrays if not x.is_deleted())


def test_the_host_holds_the_states_once_whoever_still_names_old_ones(monkeypatch):
    gc.collect()
    others, num_layers, held = _held_on_host(), 8, []
    state, step = _setup("adamw", memory="host", num_layers=num_layers)
    size, put = _held_on_host() - others, jax.device_put

    def noting(*args):
        done = put(*args)
        held.append(_held_on_host() - others)
        return done

    monkeypatch.setattr(jax, "device_put", noting)
    named = [state]
    for number in range(3):
        named.append(step(named[-1], _batch(number), jax.random.key(0))[0])
    # A layer's new state is written before its old one is freed.
    assert size > 0
    assert max(held) == size + size // num_layers
    assert _held_on_host() - others == size


@pytest.mark.parametrize(("kind", "memory"), [("adamw", "host"), ("adafactor", "device")])
def test_a_state_in_shards_moves_as_on_one_device(kind, memory):
    whole, _ = _run(*_setup(kind, memory=memory))
    state, step = _setup(kind, memory=memory, make_shardings=_on_mesh(8))
    before = jax.tree.map(lambda x: x.sharding, state)
    sharded, _ = _run(state, step)
    assert jax.tree.map(lambda x: x.sharding, sharded) == before
    assert sharded.params["kernel"][...].sharding.spec == PartitionSpec(None, "fsdp", None)
    for one, other in zip(
        jax.tree.leaves(whole.params), jax.tree.leaves(sharded.params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def _in_8_bits(**changes):
    """Return the state and the step of blocks that are longer than a device's part of a row."""
    numbers = _numbers("adamw", mu_dtype="8bit", nu_dtype="8bit")
    return _setup("adamw", numbers=numbers, width=320, **changes)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_moments_in_8_bits_move_parameters_nearly_as_in_float32(rounding):
    state, step = _setup("adamw", width=320)
    start = optim.arrays_of(jax.device_get(state.params))
    exact, _ = _run(state, step, num_steps=20)
    found, _ = _run(*_in_8_bits(rounding=rounding), num_steps=20)
    moved = optim.arrays_of(jax.device_get(found.params))
    for name, value in optim.arrays_of(jax.device_get(exact.params)).items():
        way = np.linalg.norm(value - start[name])
        assert np.linalg.norm(moved[name] - value) < 0.1 * way, name
    moments = found.opt_state.inner[f"layers_{_LAYERS}"]
    assert moments.mu["kernel"].codes.dtype == jnp.int8
    assert moments.nu["kernel"].codes.dtype == jnp.uint8
    assert moments.nu["kernel"].sizes.shape == (_LAYERS, 320, 2)
    assert moments.nu["scale"].dtype == jnp.float32  # too small for blocks


def test_moments_in_8_bits_lie_as_their_parameters_and_move_as_on_one_device():
    whole, _ = _run(*_in_8_bits())
    spread, _ = _run(*_in_8_bits(make_shardings=_on_mesh(4)))
    for place, name, stack in (
        (PartitionSpec(None, "fsdp", None), "kernel", f"layers_{_LAYERS}"),
        (PartitionSpec(None, "fsdp"), "table", "plain"),
    ):
        one, other = (state.opt_state.inner[stack].nu[name] for state in (whole, spread))
        assert other.codes.sharding.spec == place
        assert other.sizes.sharding.spec[: other.sizes.ndim - 1] == place[:-1]
        # Gradients are summed in another order: a number between two codes may fall to the other.
        assert np.mean(np.asarray(one.codes) == np.asarray(other.codes)) > 0.99
    for one, other in zip(
        jax.tree.leaves(whole.params), jax.tree.leaves(spread.params), strict=True
    ):
        assert np.isclose(one, other, rtol=1e-4, atol=1e-5).mean() > 0.999
        np.testing.assert_allclose(one, other, atol=2e-3)


def test_moments_in_8_bits_are_streamed_from_the_host_with_the_same_steps():
    found, told = {}, {}
    for memory in ("device", "host"):
        state, step = _in_8_bits(memory=memory, make_shardings=_on_mesh(1))
        found[memory], told[memory] = _run(state, step)
    for one, other in zip(*(jax.tree.leaves(s.params) for s in found.values()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    codes = found["host"].opt_state.inner[f"layers_{_LAYERS}"][0].mu["kernel"].codes
    assert codes.sharding.memory_kind == "pinned_host"


@pytest.mark.parametrize(
    ("kind", "memory"), [("muon", "device"), ("muon", "host"), ("8bit", "device")]
)
def test_a_step_that_is_not_finite_leaves_every_state_alone(kind, memory):
    if kind == "8bit":
        state, step = _in_8_bits(rounding="stochastic")
    else:
        state, step = _setup(kind, memory=memory)
    state, _ = _run(state, step, num_steps=1)
    before = jax.device_get((state.params, state.opt_state.inner))
    batch = _batch(1)
    batch["y"][0, 0] = np.nan
    state, told = step(state, batch, jax.random.key(0))
    assert metrics.read(told)["optim/skipped_in_row"] == 1
    after = jax.device_get((state.params, state.opt_state.inner))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_microbatches_add_up_in_float32_whatever_the_weights_are(param_dtype):
    parts = {
        m: _run(*_setup("adamw", param_dtype=param_dtype, num_microbatches=m), num_microbatches=m)
        for m in (1, 4)
    }
    for one, other in zip(*(jax.tree.leaves(parts[m][0].params) for m in (1, 4)), strict=True):
        tolerance = 1e-5 if param_dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(
            *(np.asarray(x, np.float32) for x in (one, other)), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize(("kind", "num_microbatches"), [("adamw", 1), ("adamw", 2), ("muon", 1)])
def test_a_step_holds_one_set_of_gradients_and_changes_the_state_in_place(kind, num_microbatches):
    make = functools.partial(Stacked, num_layers=64, width=128)
    graphdef, params = train_state.abstract_params(make, param_dtype=jnp.float32)
    optimizer = _make_optimizer(params, kind)
    step = train_step.make_train_step(
        graphdef,
        _loss_fn,
        optimizer,
        weights_fn=lambda batch: {"error": jnp.float32(batch["y"].size)},
        coefficients={"error": 1.0},
        num_microbatches=num_microbatches,
        shardings=None,
    )
    state = train_state.abstract_state(params, optimizer)
    batch = _batch(0, num_microbatches=num_microbatches)
    memory = step.lower(state, batch, jax.random.key(0)).compile().memory_analysis()
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes
    # A layer is a 64th; without walking over them moments would be copied whole.
    assert size < memory.temp_size_in_bytes < 1.5 * size


def test_stochastic_rounding_goes_to_a_neighbour_and_keeps_the_mean():
    values = jnp.array([1.0 + 2**-10, -3.0 - 2**-9, 1e-30, 0.0, 2.0], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    rounded = jax.vmap(
        lambda key: optim_kinds.stochastic_round(values, jnp.dtype(jnp.bfloat16), key)
    )(keys).astype(np.float32)
    for column, value in zip(rounded.T, values, strict=True):
        assert len(np.unique(column)) <= 2
        assert column.min() <= value <= column.max()
    # 1 + 2^-10 lies an eighth of the way to 1 + 2^-7: 4000 draws have a deviation of 0.5 %.
    np.testing.assert_allclose((rounded[:, 0] > 1).mean(), 1 / 8, atol=0.02)
    np.testing.assert_allclose(rounded.mean(0), values, rtol=1e-3)
    odd = jnp.array([jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    kept = optim_kinds.stochastic_round(odd, jnp.dtype(jnp.bfloat16), keys[0])
    np.testing.assert_array_equal(kept.astype(np.float32), odd)


def test_small_steps_move_bfloat16_weights_only_when_rounded_stochastically():
    # 2^-12 of a weight is an eighth of the distance that rounding to the nearest needs.
    moved = {}
    for rounding in ("nearest", "stochastic"):
        params = nnx.State({"w": nnx.Param(jnp.ones(4096, jnp.bfloat16), axes=("norm",))})
        optimizer = _make_optimizer(
            params,
            rounding=rounding,
            schedule=lambda step: jnp.full((), 2.0**-12),
            no_decay=(),
            weight_decay=0.0,
        )
        state = optimizer.init(params)
        for number in range(4):
            params, state, _ = optimizer.update(
                jax.tree.map(jnp.ones_like, params),
                state,
                params,
                step=jnp.int32(number),
                is_finite=jnp.array(True),
                is_empty=jnp.array(False),
                key=jax.random.key(number),
            )
        moved[rounding] = 1 - float(params["w"][...].astype(jnp.float32).mean())
    assert moved["nearest"] == 0
    np.testing.assert_allclose(moved["stochastic"], 4 * 2.0**-12, rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kind": "lion"}, "eps must be None for kind=lion"),
        ({"kind": "adafactor", "b2": None, "nu_dtype": None, "b1": None}, "give both or neither"),
        ({"kind": "adamw", "nu_dtype": None}, "nu_dtype must be given for kind=adamw"),
        ({"b2": 1.0}, r"b2 must be in \[0, 1\)"),
    ],
)
def test_numbers_that_a_kind_does_not_read_are_problems(changes, problem):
    given = {
        "kind": "adamw",
        **_NUMBERS["adamw"],
        **dict.fromkeys(("no_decay", "frozen", "factors"), ()),
        **{"schedule": "constant", "peak": 1.0, "warmup_steps": 0, "warmup_fraction": None},
        **{"end_factor": 1.0, "weight_decay": 0.0, "clip_norm": None},
        **{"rounding": "nearest", "memory": "device"},
    }
    assert configuration.Optim(**given).problems() == []
    found = configuration.Optim(**(given | changes)).problems()
    assert any(re.search(problem, one) for one in found), found
