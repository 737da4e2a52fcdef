"""A stage begins with the step of a run that its configuration names."""

import dataclasses

import jax
import numpy as np
import pytest

from prism_jax import configuration, errors, main
from prism_jax.checkpoints import pretrained
from prism_jax.setup import models as setup_models
from tests import tiny_checkpoint, training_run
from tests.stages import rl_toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_checkpoint.write(root / "hf")
    training_run.write(root / "run", models={"": root / "hf"}, steps=(1, 2, 3), finished=True)
    training_run.write(root / "plain", models={"": root / "hf"}, steps=(1,), finished=True)
    training_run.name_best(root / "run", 2)
    return root


def _source(folder, step):
    return configuration.Model(
        folder=str(folder),
        init="pretrained",
        sizes=None,
        remat="none",
        dtype="float32",
        param_dtype="float32",
        attention="xla",
        lora=configuration.NO_LORA,
        step=step,
    )


@pytest.mark.parametrize(("step", "expected"), [(None, 3), ("best", 2), (1, 1)])
def test_the_parameters_are_those_of_the_step_that_is_named(folder, tmp_path, step, expected):
    source = _source(folder / "run", step)
    files = setup_models.keep_files(source, tmp_path)
    model = setup_models.open_model(source, rl_toy.devices(), files=files, is_discriminator=False)
    wanted = training_run.moved(training_run.params_of(folder / "hf"), expected)
    got = setup_models.load_params(model, rl_toy.devices())
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("plain", r"plain has no best\.json"),
        ("hf", "not the workdir of a stage: no step best"),
    ],
)
def test_a_folder_without_a_best_step_is_refused_before_anything_is_kept(
    folder, tmp_path, name, told
):
    with pytest.raises(errors.InputError, match=told):
        setup_models.keep_files(_source(folder / name, "best"), tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_new_model_has_no_step(folder):
    source = _source(folder / "hf", "best")
    problems = configuration.Model.problems(dataclasses.replace(source, init="random"))
    assert "step must be None when init is 'random', got best" in problems


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_generate_and_serve_read_the_step_that_is_named(folder, monkeypatch, capsys, command):
    def load(path, **options):
        raise errors.InputError(f"step {pretrained.Source.of(path, step=options['step']).step}")

    monkeypatch.setattr(pretrained, "load", load)
    more = ["--prompt=x"] if command == "generate" else ["--port=0"]
    for name, step, told in (("run", "best", "step 2"), ("run", "1", "step 1")):
        assert main.main([command, f"--model={folder / name}", f"--step={step}", *more]) == 2
        assert told in capsys.readouterr().err
    assert main.main([command, f"--model={folder / 'plain'}", "--step=best", *more]) == 2
    assert "plain has no best.json" in capsys.readouterr().err
