"""Eight devices give the outputs and gradients of one; rules are checked."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models import config as config_lib
from models import inputs, presets, qwen3_vl, sharding
from prism_jax import errors
from prism_jax import mesh as mesh_lib
from tests.models import cases, ours, weights

_ROWS = [
    *cases.ROWS["rows_of_different_length"],
    *cases.ROWS["a_video"],
    *cases.ROWS["one_image"],
    *cases.ROWS["two_images_of_different_size"],
    *cases.ROWS["text_alone"][:1],
]
_RULES = mesh_lib.rules(mesh_lib.DEFAULT_RULES)


def _model(case: str, rules: sharding.Rules, moe: str):
    config_json = cases.CONFIGS[case]
    config = config_lib.from_hf(config_json)
    graphdef, abstract = qwen3_vl.abstract(
        lambda: qwen3_vl.Qwen3VL(
            config,
            has_head=True,
            moe_implementation=moe if config.text.moe else None,
            rules=rules,
            dtype=np.float32,
            param_dtype=np.float32,
            rngs=nnx.Rngs(0),
        )
    )
    return config, graphdef, weights.fill(abstract, config_json, cases.weight)


def _batch(config, num_vision_rows: int) -> cases.Batch:
    rows = [[row] for row in _ROWS]
    shared = {"config": config, "num_vision_rows": num_vision_rows}
    return cases.Batch(
        text=inputs.pack_text(rows, row_tokens=40, max_segments=2, **shared),
        vision=inputs.pack_vision(rows, row_patches=208, max_segments=16, **shared),
    )


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _run(graphdef, params, batch, cotangent):
    return jax.grad(ours.loss, argnums=1, has_aux=True)(graphdef, params, batch, cotangent, "full")


def _place(batch: cases.Batch, mesh) -> cases.Batch:
    rows = PartitionSpec(("data", "fsdp"))

    def put(path, x):
        second = any(getattr(key, "name", "") == "positions" for key in path)
        spec = PartitionSpec(None, *rows) if second else rows
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(put, batch)


@pytest.mark.parametrize(
    ("case", "moe", "axes"),
    [
        ("dense_untied_3_levels_head72", "dense", (2, 2, 1, 2, 1)),
        ("moe_untied", "dense", (2, 2, 1, 1, 2)),
        ("moe_tied_8_experts", "ragged", (2, 1, 1, 2, 2)),
        ("dense_untied_3_levels_head72", "dense", (1, 2, 4, 1, 1)),
        ("moe_tied_8_experts", "ragged", (2, 1, 2, 1, 2)),
    ],
)
def test_eight_devices_give_the_outputs_and_gradients_of_one(case, moe, axes):
    sizes = dict(zip(mesh_lib.AXES, axes, strict=True))
    mesh = mesh_lib.make(sizes)
    config, graphdef, params = _model(case, _RULES, moe)
    _, single_graph, _ = _model(case, sharding.REPLICATED, moe)
    parts = sizes["data"] * sizes["fsdp"]
    cotangent = cases.cotangent(case, (len(_ROWS), 40, cases.VOCAB))
    expected = _run(single_graph, params, _batch(config, 1), cotangent)

    spread = jax.device_put(params, mesh_lib.param_shardings(params, mesh, _RULES))
    with jax.set_mesh(mesh):
        found = _run(graphdef, spread, _place(_batch(config, parts), mesh), cotangent)
    shown = np.asarray(_batch(config, 1).text.segments.ids) > 0
    for what in ("hidden", "logits"):
        ours_, theirs = (np.asarray(told[what])[shown] for _, told in (found, expected))
        np.testing.assert_allclose(ours_, theirs, atol=2e-4 * np.abs(theirs).max(), err_msg=what)
    by_name = [weights.by_name(grads, cases.CONFIGS[case]) for grads, _ in (found, expected)]
    for name, theirs in by_name[1].items():
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(by_name[0][name], theirs, atol=2e-4 * scale, err_msg=name)


def test_parameters_are_made_in_their_shards():
    mesh = mesh_lib.make({"data": 1, "fsdp": 4, "tensor": 2, "expert": 1})

    def make() -> qwen3_vl.Qwen3VL:
        return qwen3_vl.Qwen3VL(
            presets.TINY,
            has_head=True,
            moe_implementation=None,
            rules=_RULES,
            dtype=np.float32,
            param_dtype=np.float32,
            rngs=nnx.Rngs(0),
        )

    _, abstract = qwen3_vl.abstract(make)
    places = mesh_lib.param_shardings(abstract, mesh, _RULES)
    params = jax.jit(lambda: nnx.state(make()), out_shardings=places)()
    kernel = params["text"]["layers"]["mlp"]["gate"]["kernel"][...]
    assert kernel.sharding.spec == PartitionSpec(None, ("fsdp", "sequence"), "tensor")
    layers, embed, mlp = kernel.shape
    assert {s.data.shape for s in kernel.addressable_shards} == {(layers, embed // 4, mlp // 2)}


def test_two_dimensions_on_one_mesh_axis_are_refused():
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES | {"mlp": "fsdp"})
    with pytest.raises(ValueError, match=r"'embed' and 'mlp'.*'fsdp'"):
        sharding.spec(rules, "embed", "mlp")


def test_an_axis_without_a_rule_and_an_unknown_axis_are_refused():
    with pytest.raises(ValueError, match="'embed'"):
        sharding.spec(sharding.Rules((("mlp", None),)), "embed")
    with pytest.raises(ValueError, match="embd"):
        sharding.Rules((("embd", None),))
    with pytest.raises(errors.InputError, match="model"):
        mesh_lib.rules({"embed": "model"})


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"data": 3, "fsdp": 1, "tensor": 1, "expert": 1}, "8 devices"),
        ({"data": -1, "fsdp": 1, "tensor": -1, "expert": 1}, "-1 for one of them"),
        ({"data": 8, "model": 1}, "no mesh axis .'model'"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, told):
    with pytest.raises(errors.InputError, match=told):
        mesh_lib.make(sizes)


def test_one_free_axis_takes_what_is_left():
    assert mesh_lib.make({"data": 1, "fsdp": -1, "tensor": 2, "expert": 1}).shape["fsdp"] == 4


@pytest.mark.parametrize(
    ("num_devices", "num_slices", "max_fsdp", "data", "fsdp"),
    [(1, 1, 128, 1, 1), (12, 1, 128, 3, 4), (256, 1, 128, 2, 128), (64, 4, 128, 4, 16)],
)
def test_data_and_fsdp_share_out_any_number_of_devices(
    num_devices, num_slices, max_fsdp, data, fsdp
):
    free = {"data": -1, "fsdp": -1, "tensor": 1, "expert": 1}
    found = mesh_lib.axis_sizes(free, num_devices, num_slices=num_slices, max_fsdp=max_fsdp)
    assert (found["data"], found["fsdp"]) == (data, fsdp)


def test_a_parameter_that_the_mesh_does_not_divide_is_named():
    mesh = mesh_lib.make({"data": 1, "fsdp": 1, "tensor": 1, "expert": 8})
    _, _, params = _model("moe_untied", _RULES, "dense")
    with pytest.raises(errors.InputError, match=r"text/layers/moe/down.*4 over expert = 8"):
        mesh_lib.param_shardings(params, mesh, _RULES)
