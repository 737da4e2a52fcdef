"""The form that decoding reads, against the stacked parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from models import sharding
from prism_jax import mesh as mesh_lib
from prism_jax.rollout import layout, serving
from tests.models import cases, ours

_DENSE, _MOE = "dense_untied_3_levels_head72", "moe_untied"
_ALONE = {"mesh": None, "rules": sharding.REPLICATED}


def _prepared(case: str, *, join: bool = True) -> tuple[nnx.GraphDef, nnx.State]:
    graphdef, params = ours.model(case)
    return serving.prepare(graphdef, params, dtype=jnp.float32, donate=False, join=join, **_ALONE)


def _layer(params: nnx.State, number: int) -> dict[str, nnx.Variable]:
    flat = nnx.to_flat_state(params)
    return {"/".join(p[3:]): leaf for p, leaf in flat if p[:3] == ("text", "layers", number)}


@functools.partial(jax.jit, static_argnums=0)
def _decode(graphdef, params, batch, more):
    """Return the hidden states of prompts and of two more tokens."""
    built = nnx.merge(graphdef, params)
    images = built.encode_images(batch.vision, implementation="xla", remat=False)
    hidden, cache = built.prefill(batch.text, images, implementation="xla", cache_length=48)
    found = [hidden]
    for tokens in more:
        hidden, cache = built.decode_step(tokens, cache, implementation="xla")
        found.append(hidden)
    return jnp.stack(found)


@pytest.mark.parametrize("case", [_DENSE, _MOE])
def test_joined_maps_give_what_the_separate_ones_give(case):
    more = np.random.default_rng(0).integers(1, 180, (2, 3)).astype(np.int32)
    graphdef, params = _prepared(case, join=False)
    config = nnx.merge(graphdef, params).config
    batch = cases.batch([[e] for e in cases.ROWS["rows_of_different_length"]], config)
    separate = _decode(graphdef, params, batch, more)
    joined = _decode(*_prepared(case), batch, more)
    np.testing.assert_allclose(joined, separate, atol=2e-5 * np.abs(separate).max())


def test_a_layer_has_one_map_for_q_k_v_and_one_for_gate_and_up():
    stacked = ours.model(_DENSE)[1]["text"]["layers"]
    layer = _layer(_prepared(_DENSE)[1], 1)
    assert sorted(layer) == [
        "attn/o/kernel",
        "attn/qk_norm/scale",
        "attn/qkv/kernel",
        "input_norm/scale",
        "mlp/down/kernel",
        "mlp/gate_up/kernel",
        "post_norm/scale",
    ]
    qkv = layer["attn/qkv/kernel"]
    assert qkv.shape == (48, 2, 4, 24)  # 2 kv heads with 2 queries, a key and a value
    # The axes are those of one layer, so that the parameters can be laid on a mesh.
    assert qkv.get_metadata("axes") == ("embed", "kv_heads", None, None)
    query = stacked["attn"]["q"]["kernel"][...][1]
    np.testing.assert_array_equal(qkv[:, 1, 0], query[:, 2 * 24 : 3 * 24])
    key = stacked["attn"]["k"]["kernel"][...][1]
    np.testing.assert_array_equal(qkv[:, 1, 2], key[:, 24:])
    up = stacked["mlp"]["up"]["kernel"][...][1]
    np.testing.assert_array_equal(layer["mlp/gate_up/kernel"][:, 1], up)
    norm = stacked["attn"]["k_norm"]["scale"][...][1]
    np.testing.assert_array_equal(layer["attn/qk_norm/scale"][2], norm)


def test_experts_stay_apart():
    layer = _layer(_prepared(_MOE)[1], 0)
    assert {"attn/qkv/kernel", "moe/gate", "moe/up"} <= set(layer)


def test_donating_frees_the_stack_and_casts():
    graphdef, params = ours.model(_MOE)
    copied = jax.tree.map(jnp.copy, params)
    _, prepared = serving.prepare(graphdef, copied, dtype=jnp.bfloat16, donate=True, **_ALONE)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copied))
    assert {leaf.dtype for leaf in jax.tree.leaves(prepared)} == {jnp.dtype(jnp.bfloat16)}
    out = params["text"]["layers"]["attn"]["o"]["kernel"][...][1]
    np.testing.assert_array_equal(
        _layer(prepared, 1)["attn/o/kernel"][...], out.astype(jnp.bfloat16)
    )


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_weights_of_any_mesh_come_to_the_sampler_s_own(tensor):
    trained = mesh_lib.make({"data": 1, "fsdp": 4, "tensor": 2, "expert": 1})
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES)
    graphdef, params = ours.model(_DENSE)
    spread = jax.device_put(params, mesh_lib.param_shardings(params, trained, rules))
    mesh = layout.mesh(trained, tensor=tensor)
    assert mesh.shape == dict.fromkeys(mesh_lib.AXES, 1) | {"data": 8 // tensor, "tensor": tensor}
    _, prepared = serving.prepare(
        graphdef, spread, dtype=jnp.float32, donate=False, mesh=mesh, rules=rules
    )
    layer = _layer(prepared, 2)
    gate_up = layer["mlp/gate_up/kernel"][...]
    assert gate_up.sharding.spec == PartitionSpec(("fsdp", "sequence"), None, "tensor")
    # Whole on each device, or cut over `tensor` alone: nothing is gathered for a token.
    assert gate_up.addressable_shards[0].data.shape == (48, 2, 80 // tensor)
    # The mesh cuts queries as it cuts keys, unless there are fewer kv heads than devices.
    assert ("attn/qkv/kernel" in layer) == (tensor <= 2)
    expected = _prepared(_DENSE, join=tensor <= 2)[1]
    if tensor <= 2:
        jax.tree.map(np.testing.assert_array_equal, prepared, expected)


def test_replicated_weights_that_are_kept_come_to_the_sampler_s_mesh_too():
    trained = mesh_lib.make({"data": 1, "fsdp": 2, "tensor": 1, "expert": 1}, jax.devices()[:2])
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES)
    graphdef, params = ours.model(_DENSE)
    whole = jax.sharding.NamedSharding(trained, PartitionSpec())
    params = jax.device_put(jax.tree.map(jnp.copy, params), whole)
    mesh = layout.mesh(trained, tensor=1)
    # Nothing is cast, so that every parameter might be kept as it is.
    _, prepared = serving.prepare(
        graphdef, params, dtype=jnp.float32, donate=True, mesh=mesh, rules=rules
    )
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(prepared)} == {mesh}


def test_a_copy_of_the_weights_must_divide_the_devices():
    trained = mesh_lib.make({"data": 8, "fsdp": 1, "tensor": 1, "expert": 1})
    with pytest.raises(ValueError, match=r"rollout\.tensor must divide 8 devices, got 3"):
        layout.mesh(trained, tensor=3)


def test_only_layers_one_by_one_are_joined():
    graphdef, params = ours.model(_DENSE)
    with pytest.raises(ValueError, match=r"text\.unstack"):
        nnx.merge(graphdef, params).text.join(heads=True)
