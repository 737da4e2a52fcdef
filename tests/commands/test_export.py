"""`export`: a run's checkpoint becomes a folder that transformers loads."""

import errno
import json
import pathlib

import numpy as np
import pytest

from models.hf import writer as hf_writer
from prism_jax import main
from prism_jax.checkpoints import pretrained
from prism_jax.data import processor, prompts
from tests import hf_checkpoints, tiny_checkpoint, training_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("export")
    tiny_checkpoint.write(root / "start")
    tiny_checkpoint.write(root / "judge", num_experts=4, score=True)
    both = {"policy": root / "start", "discriminator": root / "judge"}
    training_run.write(root / "align", models=both, steps=(1, 2), finished=False)
    return root


def _export(folder: pathlib.Path, to: pathlib.Path, *extra: str) -> int:
    command = ["export", f"--workdir={folder / 'align'}", f"--to={to}"]
    return main.main([*command, *extra])


@pytest.mark.parametrize(
    ("item", "start", "step"), [("policy", "start", 2), ("discriminator", "judge", 1)]
)
def test_an_export_holds_the_trained_weights_under_their_hf_names(
    folder, tmp_path, capsys, item, start, step
):
    options = ["--dtype=as_is", f"--item={item}", f"--step={step}"]
    assert _export(folder, tmp_path / "out", *options) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out'}\n"
    assert f"{item} of step {step}" in captured.err
    before, after = (hf_checkpoints.read(where) for where in (folder / start, tmp_path / "out"))
    assert after.keys() == before.keys()
    assert ("v_head.1.weight" in after) == (item == "discriminator")
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value + np.float32(step / 64), err_msg=name)


def test_an_export_takes_the_best_step_where_the_run_names_one(folder, tmp_path, capsys):
    command = ("--dtype=as_is", "--step=best")
    assert _export(folder, tmp_path / "out", *command) == 2
    assert "align has no best.json" in capsys.readouterr().err
    training_run.name_best(folder / "align", 1)
    try:
        assert _export(folder, tmp_path / "out", *command) == 0
    finally:
        (folder / "align" / "best.json").unlink()
    assert "policy of step 1" in capsys.readouterr().err


def test_an_export_takes_the_policy_at_the_newest_step_in_bfloat16(folder, tmp_path):
    assert _export(folder, tmp_path / "out") == 0
    before, after = (hf_checkpoints.read(where) for where in (folder / "start", tmp_path / "out"))
    for name, value in before.items():
        expected = (value + np.float32(2 / 64)).astype(after[name].dtype)
        assert after[name].dtype.name == "bfloat16"
        assert after[name].tobytes() == expected.tobytes()


def test_an_export_has_the_files_of_the_model_that_the_run_began_with(folder, tmp_path):
    assert _export(folder, tmp_path / "out") == 0
    for name in ("tokenizer.json", "preprocessor_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "start" / name).read_bytes()
    config, before = (
        json.loads((where / "config.json").read_text())
        for where in (tmp_path / "out", folder / "start")
    )
    assert config == before


def test_config_json_names_the_type_of_the_weights(folder, tmp_path):
    path = folder / "align" / "model" / "config.json"
    given = path.read_bytes()
    values = json.loads(given)
    values["dtype"] = values["text_config"]["dtype"] = "float16"
    path.write_text(json.dumps(values))
    try:
        assert _export(folder, tmp_path / "out") == 0
    finally:
        path.write_bytes(given)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert "dtype" not in config["vision_config"]


@pytest.fixture(scope="module")
def bounded(folder) -> pathlib.Path:
    """Return a run whose configuration bounds its pictures."""
    config = {"prompts": {"min_pixels": 2048, "max_pixels": 65536}, "discriminator": {}}
    models = {"": folder / "start"}
    return training_run.write(
        folder / "bounded", models=models, steps=(1,), finished=False, config=config
    )


_QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}


def _rendered(words, system) -> str:
    turns = [] if system is None else [{"role": "system", "content": system}]
    return words.tokenizer.apply_chat_template(
        [*turns, _QUESTION],
        chat_template=words.template,
        tokenize=False,
        add_generation_prompt=True,
    )


@pytest.mark.parametrize("prompt", [None, 'Say "7",\nthen {{ stop }} – é.\n'])
def test_an_evaluation_template_shows_the_prompt_of_training_where_no_other_is_given(
    bounded, folder, tmp_path, prompt
):
    option = "--eval_template"
    if prompt is not None:
        (tmp_path / "system.txt").write_text(prompt)
        option += f"={tmp_path / 'system.txt'}"
    command = ["export", f"--workdir={bounded}", f"--to={tmp_path / 'out'}", option]
    assert main.main(command) == 0
    before, after = (
        processor.Processor.from_folder(where) for where in (folder / "start", tmp_path / "out")
    )
    trained = _rendered(before, prompts.SYSTEM_PROMPT if prompt is None else prompt)
    placeholder = "You are a helpful assistant."
    # As vLLM, lmms-eval's simple class and its chat class give the messages.
    for system in (None, placeholder, [{"type": "text", "text": placeholder}]):
        assert _rendered(after, system) == trained
    assert _rendered(after, "Another.") == _rendered(before, "Another.")
    assert trained.count("<|im_start|>system") == 1
    # No other place holds the former template.
    assert "chat_template" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert not (tmp_path / "out/chat_template.json").exists()


def test_an_evaluation_template_bounds_pictures_as_training_did(bounded, tmp_path, capsys):
    command = ["export", f"--workdir={bounded}", f"--to={tmp_path / 'out'}", "--eval_template"]
    assert main.main(command) == 0
    assert "pictures: min_pixels 2048, max_pixels 65536\n" in capsys.readouterr().err
    settings = processor.Processor.from_folder(tmp_path / "out").image_settings
    assert (settings.min_pixels, settings.max_pixels) == (2048, 65536)
    values = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert values["size"] == {"shortest_edge": 2048, "longest_edge": 65536}


def test_an_evaluation_template_names_the_ends_that_no_file_of_the_model_does(
    bounded, folder, tmp_path
):
    command = ["export", f"--workdir={bounded}", "--eval_template"]
    assert main.main([*command, f"--to={tmp_path / 'named'}"]) == 0
    name = "generation_config.json"
    given = (folder / "start" / name).read_bytes()
    assert (tmp_path / "named" / name).read_bytes() == given
    tokenizer = processor.Processor.from_folder(folder / "start").tokenizer
    path = bounded / "model" / name
    path.unlink()
    try:
        assert main.main([*command, f"--to={tmp_path / 'out'}"]) == 0
    finally:
        path.write_bytes(given)
    expected = {
        "eos_token_id": [tokenizer.eos_token_id],
        "pad_token_id": tokenizer.pad_token_id,
    }
    assert json.loads((tmp_path / "out" / name).read_text()) == expected


def test_a_discriminator_has_no_evaluation_template(folder, tmp_path, capsys):
    assert _export(folder, tmp_path / "out", "--item=discriminator", "--eval_template") == 2
    assert "--eval_template is of a policy" in capsys.readouterr().err
    assert _export(folder, tmp_path / "out", f"--eval_template={tmp_path / 'none'}") == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.torch
def test_transformers_loads_an_exported_policy(folder, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    assert _export(folder, tmp_path / "out", "--dtype=as_is") == 0
    built, told = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    got = built.model.language_model.norm.weight.detach().numpy()
    stored = hf_checkpoints.read(folder / "start")["model.language_model.norm.weight"]
    np.testing.assert_array_equal(got, stored + np.float32(2 / 64))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--step=9"], "[1, 2]"),
        (["--workdir=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_exit_code_2(
    folder, tmp_path, capsys, options, told
):
    assert _export(folder, tmp_path / "out", *options) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert told in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["file", "file/out", "long" * 80])
def test_a_folder_that_cannot_be_made_is_one_line_before_anything_is_loaded(
    folder, tmp_path, capsys, monkeypatch, name
):
    monkeypatch.setattr(pretrained.Source, "load", None)
    (tmp_path / "file").write_text("mine")
    assert _export(folder, tmp_path / name) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --to: {tmp_path}")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_parent_that_may_not_be_written_to_is_one_line(folder, tmp_path, capsys, monkeypatch):
    # Permissions would not stop root, who may run these tests.
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(hf_writer.tempfile, "mkdtemp", refuse)
    assert _export(folder, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --to: {tmp_path / 'out'} cannot be written: ")
    assert "Permission denied" in err


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    def fill(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(hf_writer, "_sync", fill)
    assert _export(folder, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --to: {tmp_path / 'out'} cannot be written: ")
    assert "No space left on device" in err
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(folder, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("mine")
    assert _export(folder, tmp_path) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
