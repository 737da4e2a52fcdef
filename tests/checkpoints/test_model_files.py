"""The files beside the weights: copied whole, kept on resume, never mixed."""

import pathlib

import pytest

from prism_jax import errors
from prism_jax.checkpoints import model_files
from tests import make_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("model_files") / "start"
    make_tokenizer.write_config(folder, make_tokenizer.write(folder))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "notes.txt").write_text("not a file of a model")
    return folder


def test_small_files_are_copied_bit_for_bit_and_nothing_else(source, tmp_path):
    model_files.copy(source, tmp_path / "run" / "model")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "run" / "model").iterdir()}
    assert set(copied) == {
        "config.json",
        "generation_config.json",
        "chat_template.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
    }
    assert all((source / name).read_bytes() == content for name, content in copied.items())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]


def test_a_second_copy_of_the_same_model_changes_nothing(source, tmp_path):
    target = tmp_path / "model"
    model_files.copy(source, target)
    before = {path.name: path.stat().st_ino for path in target.iterdir()}
    model_files.copy(source, target)
    assert {path.name: path.stat().st_ino for path in target.iterdir()} == before


def test_another_models_files_are_refused_by_name(source, tmp_path):
    target = tmp_path / "model"
    model_files.copy(source, target)
    (target / "generation_config.json").write_text("{}")
    with pytest.raises(errors.InputError, match=r"generation_config\.json"):
        model_files.copy(source, target)


def test_a_run_is_a_source_of_its_own_models_files(source, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    model_files.copy(source, run / "model")
    model_files.copy(run, tmp_path / "next")
    assert (tmp_path / "next" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_discriminators_files_are_the_second_models_where_a_run_has_two(source, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    assert model_files.of(run, is_discriminator=True) == run / "model"
    model_files.copy(source, run / "discriminator")
    assert model_files.of(run, is_discriminator=True) == run / "discriminator"
    assert model_files.of(run) == run / "model"
    assert model_files.of(source, is_discriminator=True) == source


def test_a_folder_without_config_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.InputError, match=r"config\.json"):
        model_files.copy(tmp_path / "empty", tmp_path / "model")
    assert not (tmp_path / "model").exists()
