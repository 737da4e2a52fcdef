"""Adapters: where they begin, what they merge to, what is trained, and what PEFT reads of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import config as config_lib
from models import lora, qwen3_vl, sharding
from models.hf import names as hf_names
from prism_jax import tree_paths
from prism_jax.checkpoints import checkpoint, lora_files, pretrained
from prism_jax.training import train_state
from tests import toy_run
from tests.models import cases, ours

_CASE, _RANK, _ALPHA = "dense_tied_2_levels_head64", 3, 6.0
_TARGETS = (r"text/layers/attn/(q|k|v|o)", r"text/layers/mlp/.*")


def _build(rngs, param_dtype=jnp.float32, targets=_TARGETS):
    model = qwen3_vl.Qwen3VL(
        config_lib.from_hf(cases.CONFIGS[_CASE]),
        has_head=True,
        moe_implementation=None,
        rules=sharding.REPLICATED,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        rngs=rngs,
    )
    lora.add(model, rank=_RANK, alpha=_ALPHA, targets=targets, rngs=rngs)
    return model


@functools.cache
def _adapted():
    """Return graph and parameters of the model of `ours` with adapters that change it."""
    _, base = ours.model(_CASE)
    graphdef, params = nnx.split(jax.jit(lambda: _build(nnx.Rngs(1)))())
    flat = dict(nnx.to_flat_state(params)) | dict(nnx.to_flat_state(base))
    for number, (path, variable) in enumerate(flat.items()):
        if path[-1] == "lora_b":
            shape = variable[...].shape
            flat[path] = variable.replace(jax.random.normal(jax.random.key(number), shape) * 0.05)
    return graphdef, nnx.from_flat_state(flat)


def _hidden(graphdef, params, rows="rows_of_different_length"):
    model = nnx.merge(graphdef, params)
    batch = jax.tree.map(jnp.asarray, cases.batch([[r] for r in cases.ROWS[rows]], model.config))
    run = jax.jit(
        lambda params: nnx.merge(graphdef, params)(
            batch.text, batch.vision, implementation="xla", remat="none"
        )[0]
    )
    return np.asarray(run(params)), batch.text.segments.ids > 0


def test_an_adapted_model_begins_as_its_base_and_changes_with_its_adapters():
    graphdef, params = _adapted()
    flat = dict(nnx.to_flat_state(params))
    for path, variable in list(flat.items()):
        if path[-1] == "lora_b":
            flat[path] = variable.replace(jnp.zeros_like(variable[...]))
    base, used = _hidden(*ours.model(_CASE))
    start, _ = _hidden(graphdef, nnx.from_flat_state(flat))
    changed, _ = _hidden(graphdef, params)
    np.testing.assert_array_equal(start, base)
    assert np.abs(changed - base)[used].max() > 1e-2


def test_merged_weights_compute_what_the_adapted_model_computes():
    adapted, used = _hidden(*_adapted())
    graphdef, merged = lora.merged(*_adapted())
    names = set(tree_paths.variables(merged))
    assert names == set(tree_paths.variables(ours.model(_CASE)[1]))
    found, _ = _hidden(graphdef, merged)
    np.testing.assert_allclose(found[used], adapted[used], rtol=1e-4, atol=1e-4)


def test_only_adapters_are_trained_and_they_stay_in_float32():
    _, params = train_state.abstract_params(
        lambda rngs: _build(rngs, jnp.bfloat16), param_dtype=jnp.bfloat16
    )
    optimizer = toy_run.make_optimizer(
        params, groups=((lora.FROZEN, None), (".*", 1.0)), no_decay=()
    )
    trainable, frozen = (tree_paths.variables(part) for part in optimizer.split(params))
    assert {name.rpartition("/")[2] for name in trainable} == {"lora_a", "lora_b"}
    assert len(trainable) == 2 * 7
    assert {v.dtype.name for v in trainable.values()} == {"float32"}
    kernels = {v.dtype.name for name, v in frozen.items() if "lora" not in name}
    assert kernels == {"bfloat16"}
    state = train_state.abstract_state(params, optimizer)
    (layers,) = state.opt_state.inner.values()
    assert layers.mu.keys() == trainable.keys()


def test_targets_that_match_no_linear_map_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"'text/layers/attn/x' matches no linear map.*attn/q"):
        nnx.eval_shape(lambda: _build(nnx.Rngs(0), targets=("text/layers/attn/x",)))


def test_a_checkpoint_of_a_run_is_read_merged_or_its_adapters_alone(tmp_path):
    _, params = _adapted()
    checkpoint.save_params(str(tmp_path / "run"), params, identity=toy_run.identity(), step=3)
    source = pretrained.Source(
        folder=tmp_path / "run",
        files=tmp_path,
        arrays=tmp_path / "run",
        item="params",
        step=3,
        is_discriminator=False,
        layout="4.57",
        dtype="float32",
    )
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), ours.model(_CASE)[1])
    merged = source.load(base, shardings=None, param_dtype=None)
    jax.tree.map(np.testing.assert_array_equal, merged, lora.merged(*_adapted())[1])
    adapters = tree_paths.variables(source.load_adapters())
    expected = tree_paths.variables(lora.split(params)[1])
    assert adapters.keys() == expected.keys()
    for name, variable in adapters.items():
        np.testing.assert_array_equal(variable[...], expected[name][...])


@pytest.mark.torch
def test_peft_reads_the_adapter_and_computes_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    reference = pytest.importorskip("tests.models.reference")
    _, params = _adapted()
    naming = hf_names.naming(cases.CONFIGS[_CASE])
    lora_files.save(tmp_path / "adapter", lora.split(params)[1], naming, base="base")
    model = reference.model(cases.CONFIGS[_CASE])
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    rows = "rows_of_different_length"
    with torch.no_grad():
        out = adapted(**reference.arguments(cases.ROWS[rows]), output_hidden_states=True)
    theirs = out.hidden_states[-1].numpy()
    found, _ = _hidden(*_adapted(), rows)
    for number, row in enumerate(cases.ROWS[rows]):
        used = len(row.tokens)
        scale = np.abs(theirs[number, :used]).max()
        np.testing.assert_allclose(
            found[number, :used], theirs[number, :used], atol=1e-4 * scale, rtol=0
        )
