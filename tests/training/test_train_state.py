import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prism_jax import tree_paths
from prism_jax.training import train_state
from tests import toy_run


class WithDropout(nnx.Module):
    def __init__(self, rngs):
        self.toy = toy_run.Toy(rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def _shardings(abstract, mesh):
    def one(leaf):
        spec = [None] * leaf.ndim
        if leaf.ndim and leaf.shape[-1] % mesh.size == 0:
            spec[-1] = "data"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, abstract)


def test_logical_axes_survive_in_state_and_merged_model():
    graphdef, params = train_state.abstract_params(toy_run.Toy, param_dtype=None)
    abstract = train_state.abstract_state(params, toy_run.make_optimizer(params))
    assert abstract.params["kernel"].get_metadata("axes") == ("embed", "mlp")
    model = nnx.merge(graphdef, abstract.params)
    assert model.head.get_metadata("axes") == ("mlp", None)


def test_state_other_than_parameters_is_refused_by_name():
    with pytest.raises(ValueError, match=r"nothing but parameters.*dropout/rngs"):
        train_state.abstract_params(WithDropout, param_dtype=None)


def test_state_made_in_shards_has_the_bits_of_one_made_on_one_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    _, params = train_state.abstract_params(toy_run.Toy, param_dtype=jnp.float32)
    optimizer = toy_run.make_optimizer(params)
    shardings = _shardings(train_state.abstract_state(params, optimizer), mesh)
    whole, sharded = (
        train_state.init(
            toy_run.Toy, optimizer, jax.random.key(3), param_dtype=jnp.float32, shardings=s
        )
        for s in (None, shardings)
    )
    kernel = tree_paths.named_leaves(sharded.params)["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "data")
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_array_equal(one, other)


def test_moments_lie_on_the_mesh_as_their_parameters():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    places = {"mlp": "data", "embed": None, None: None}

    def of_params(params):
        return jax.tree.map(
            lambda p: p.replace(
                NamedSharding(mesh, PartitionSpec(*(places[a] for a in p.get_metadata("axes"))))
            ),
            params,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )

    _, params = train_state.abstract_params(toy_run.Toy, param_dtype=jnp.float32)
    optimizer = toy_run.make_optimizer(params, groups=(("head", None), (".*", 1.0)))
    abstract = train_state.abstract_state(params, optimizer)
    replicated = NamedSharding(mesh, PartitionSpec())
    found = train_state.shardings(abstract, of_params=of_params, replicated=replicated)
    state = train_state.init(
        toy_run.Toy, optimizer, jax.random.key(0), param_dtype=jnp.float32, shardings=found
    )
    assert state.params["head"][...].sharding.spec == PartitionSpec("data", None)
    moments = state.opt_state.inner["plain"]
    for tree in (state.params, moments.mu, moments.nu):
        assert tree["kernel"][...].sharding.spec == PartitionSpec(None, "data")
    assert state.opt_state.num_skipped.sharding.is_fully_replicated


def test_param_dtype_is_that_of_the_master_weights():
    _, params = train_state.abstract_params(toy_run.Toy, param_dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_loaded_parameters_start_at_step_zero_with_zero_moments():
    _, abstract = train_state.abstract_params(toy_run.Toy, param_dtype=None)
    _, params = train_state.split_model(toy_run.Toy(nnx.Rngs(1)))
    kernel = np.array(params["kernel"][...])
    state = train_state.from_params(params, toy_run.make_optimizer(abstract), shardings=None)
    assert int(state.step) == 0
    np.testing.assert_array_equal(state.params["kernel"][...], kernel)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_optimizer_of_other_parameters_is_refused():
    _, params = train_state.abstract_params(toy_run.Toy, param_dtype=None)
    optimizer = toy_run.make_optimizer(params)
    del params["head"]
    with pytest.raises(ValueError, match="they differ in head"):
        optimizer.split(params)
