"""Models from all three kinds of folders: of Hugging Face, of `convert`, of a training run."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import sharding
from prism_jax import errors, main
from prism_jax import mesh as mesh_lib
from prism_jax.checkpoints import model_files, pretrained
from tests import tiny_checkpoint, training_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("pretrained")
    tiny_checkpoint.write(root / "hf")
    tiny_checkpoint.write(root / "judge", num_experts=4, score=True)
    convert = ["convert", f"--from={root / 'hf'}", f"--to={root / 'converted'}"]
    assert main.main([*convert, "--direction=hf_to_flax"]) == 0
    training_run.write(root / "sft", models={"": root / "hf"}, steps=(3, 5), finished=True)
    training_run.write(root / "warmup", models={"": root / "judge"}, steps=(2,), finished=False)
    both = {"policy": root / "hf", "discriminator": root / "judge"}
    training_run.write(root / "align", models=both, steps=(7,), finished=False)
    return root


def _load(folder, **changes) -> pretrained.Pretrained:
    options = {"mesh": None, "rules": sharding.REPLICATED, "dtype": None, "param_dtype": None}
    return pretrained.load(folder, **(options | changes))


def _assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("kind", ["hf", "converted"])
def test_a_folder_that_was_not_trained_gives_its_own_parameters(folder, kind):
    model = _load(folder / kind)
    _assert_equal(model.params, training_run.params_of(folder / "hf"))
    assert model.dtype == jnp.float32


@pytest.mark.parametrize(("step", "expected"), [(None, 5), (5, 5), (3, 3)])
def test_a_run_gives_the_newest_step_or_the_one_that_is_named(folder, step, expected):
    model = _load(folder / "sft", step=step)
    start = training_run.params_of(folder / "hf")
    _assert_equal(model.params, training_run.moved(start, expected))
    assert pretrained.Source.of(folder / "sft", step=step).step == expected


def test_the_best_step_is_the_one_that_the_run_names(folder, tmp_path):
    shutil.copytree(folder / "sft", tmp_path / "sft")
    with pytest.raises(errors.InputError, match=r"sft has no best\.json"):
        pretrained.Source.of(tmp_path / "sft", step="best")
    training_run.name_best(tmp_path / "sft", 3)
    assert pretrained.Source.of(tmp_path / "sft", step="best").step == 3
    # The newest stays the default.
    assert pretrained.Source.of(tmp_path / "sft").step == 5
    training_run.name_best(tmp_path / "sft", 4)
    with pytest.raises(errors.InputError, match=r"no complete checkpoint of step 4 .* \[3, 5\]"):
        pretrained.Source.of(tmp_path / "sft", step="best")
    for name in ("hf", "converted"):
        with pytest.raises(errors.InputError, match=r"not the workdir of a stage: no step best"):
            pretrained.Source.of(folder / name, step="best")


def test_a_runs_parameters_are_cast_when_another_type_is_asked_for(folder):
    model = _load(folder / "sft", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    expected = training_run.moved(training_run.params_of(folder / "hf"), 5)
    _assert_equal(model.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected))


def test_a_run_loads_directly_into_its_shards(folder):
    mesh = mesh_lib.make({"data": 1, "fsdp": 1, "tensor": 2, "expert": 1}, jax.devices()[:2])
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES)
    model = _load(folder / "sft", mesh=mesh, rules=rules)
    wanted = mesh_lib.param_shardings(model.params, mesh, rules)
    got = jax.tree.map(lambda x: x.sharding, model.params)
    assert jax.tree.leaves(got) == jax.tree.leaves(wanted)
    _assert_equal(model.params, training_run.moved(training_run.params_of(folder / "hf"), 5))


@pytest.mark.parametrize(
    ("run", "role", "is_discriminator", "item", "files"),
    [
        ("sft", None, False, "params", "model"),
        ("sft", "policy", False, "params", "model"),
        ("warmup", None, True, "params", "model"),
        ("warmup", "discriminator", True, "params", "model"),
        ("align", None, False, "policy.params", "model"),
        ("align", "discriminator", True, "discriminator.params", "discriminator"),
    ],
)
def test_a_run_of_two_models_gives_the_one_that_is_asked_for(
    folder, run, role, is_discriminator, item, files
):
    source = pretrained.Source.of(folder / run, role=role)
    assert source.is_discriminator == is_discriminator
    assert source.item == item
    assert source.files == folder / run / files
    model_type = json.loads((source.files / "config.json").read_text())["model_type"]
    assert model_type == ("qwen3_vl_moe" if is_discriminator else "qwen3_vl")


@pytest.mark.parametrize(
    ("name", "role", "told"),
    [
        ("sft", "discriminator", "holds a policy"),
        ("warmup", "policy", "holds a discriminator"),
        ("hf", "discriminator", "holds a policy"),
        ("judge", "policy", "holds a discriminator"),
    ],
)
def test_the_wrong_kind_of_model_is_refused(folder, name, role, told):
    with pytest.raises(errors.InputError, match=told):
        pretrained.Source.of(folder / name, role=role)


def test_a_step_that_is_not_there_is_refused_with_those_that_are(folder):
    with pytest.raises(errors.InputError, match=r"step 4.*\[3, 5\]"):
        _load(folder / "sft", step=4)


def test_a_run_without_its_small_files_is_refused(folder, tmp_path):
    training_run.write(tmp_path / "run", models={"": folder / "hf"}, steps=(1,), finished=False)
    (model_files.of(tmp_path / "run") / "config.json").unlink()
    with pytest.raises(errors.InputError, match=r"config\.json"):
        _load(tmp_path / "run")


def test_a_fingerprint_follows_the_parameters_and_not_the_place(folder):
    prints = [
        pretrained.Source.of(folder / "sft", step=3).fingerprint(),
        pretrained.Source.of(folder / "sft", step=5).fingerprint(),
        pretrained.Source.of(folder / "align").fingerprint(),
        pretrained.Source.of(folder / "align", role="discriminator").fingerprint(),
        pretrained.Source.of(folder / "hf").fingerprint(),
    ]
    assert len(set(prints)) == len(prints)
    again = pretrained.Source.of(folder / "sft" / ".." / "sft", step=3).fingerprint()
    assert again == prints[0]


@pytest.mark.parametrize(
    ("part", "key"), [("text_config", "num_hidden_layers"), ("vision_config", "depth")]
)
def test_a_runs_config_with_other_layers_is_refused_before_a_model_is_built(
    folder, tmp_path, part, key
):
    shutil.copytree(folder / "sft", tmp_path / "run")
    path = tmp_path / "run" / "model" / "config.json"
    config = json.loads(path.read_text())
    was, config[part][key] = config[part][key], 1000
    path.write_text(json.dumps(config))
    with pytest.raises(errors.InputError, match=f"config.json says 1000 layers.*has {was}"):
        pretrained.Source.of(tmp_path / "run")
