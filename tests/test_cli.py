"""The commands on real folders and files: answers, conversion, upcycling, what is refused."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from prism_jax import main
from prism_jax.data import chat, images, processor
from tests import hf_checkpoints, make_tokenizer, tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("cli")
    tiny_checkpoint.picture(root, "a.png", (96, 64))
    tiny_checkpoint.picture(root, "b.png", (70, 130))
    tiny_checkpoint.write(root / "dense")
    return root


def _run(*argv: object) -> int:
    return main.main([str(a) for a in argv])


def _ask(folder, model, *, prompt="How many?", pictures=("a.png", "b.png"), tokens=24, extra=()):
    shown = [f"--image={folder / name}" for name in pictures]
    return _run(
        "generate",
        f"--model={folder / model}",
        *shown,
        f"--prompt={prompt}",
        f"--max_new_tokens={tokens}",
        *extra,
    )


def _save_with_transformers(target: pathlib.Path, num_experts: int | None) -> str:
    """Write a folder through `save_pretrained`: the config and layout of transformers 5."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if not target.exists():
        target.mkdir()
        ids = make_tokenizer.write(target, min_pixels=32 * 32, max_pixels=128 * 128)
        values = tiny_checkpoint.config_json(ids, num_experts=num_experts, tied=False)
        config = transformers.AutoConfig.for_model(**values)
        torch.manual_seed(0)
        built = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in built.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        built.generation_config.eos_token_id = [ids.eos_token_id, ids.pad_token_id]
        built.save_pretrained(target)
    return target.name


@pytest.mark.torch
@pytest.mark.parametrize(
    ("num_experts", "pictures"),
    [(None, ()), (None, ("a.png",)), (None, ("a.png", "b.png")), (4, ("a.png", "b.png"))],
)
def test_generate_prints_what_transformers_generates(folder, capsys, num_experts, pictures):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = _save_with_transformers(folder / f"saved_{num_experts}", num_experts)
    words = processor.Processor.from_folder(folder / model)
    opened = [images.open_image(folder / name) for name in pictures]
    message = chat.turn("user", "How many?", num_images=len(opened))
    encoded = words.encode([message], images=opened, add_generation_prompt=True)
    given = {
        "input_ids": encoded.tokens[None].astype(np.int64),
        "attention_mask": np.ones((1, len(encoded.tokens)), np.int64),
        "mm_token_type_ids": encoded.token_types[None].astype(np.int64),
    }
    if opened:
        pixels = [images.normalise(p, words.image_settings) for p in encoded.patches]
        given["pixel_values"] = np.concatenate(pixels)
        given["image_grid_thw"] = encoded.grids.astype(np.int64)
    built = transformers.AutoModelForImageTextToText.from_pretrained(
        folder / model, dtype=torch.float32
    )
    out = built.generate(
        **{name: torch.from_numpy(value) for name, value in given.items()},
        max_new_tokens=24,
        do_sample=False,
    )
    expected = words.tokenizer.decode(
        out[0, len(encoded.tokens) :], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert _ask(folder, model, pictures=pictures, extra=["--temperature=0"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_a_converted_folder_answers_the_same_and_converts_back_bit_equal(folder, capsys):
    _ask(folder, "dense")
    expected = capsys.readouterr().out
    convert = ["convert", f"--from={folder / 'dense'}", f"--to={folder / 'flax'}"]
    assert _run(*convert, "--direction=hf_to_flax") == 0
    capsys.readouterr()
    _ask(folder, "flax")
    assert capsys.readouterr().out == expected
    convert = ["convert", f"--from={folder / 'flax'}", f"--to={folder / 'back'}"]
    assert _run(*convert, "--direction=flax_to_hf") == 0
    first, second = (hf_checkpoints.read(folder / name) for name in ("dense", "back"))
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    for name in ("tokenizer.json", "config.json", "preprocessor_config.json"):
        one, two = ((folder / where / name).read_text() for where in ("dense", "back"))
        assert json.loads(one) == json.loads(two)


def test_a_flax_folder_is_read_by_a_relative_path_and_refused_when_it_is_changed(
    folder, capsys, monkeypatch
):
    monkeypatch.chdir(folder)
    convert = ["convert", "--from=dense", "--to=relative"]
    assert _run(*convert, "--direction=hf_to_flax") == 0
    assert _run("generate", "--model=relative", "--prompt=Hi", "--max_new_tokens=2") == 0
    capsys.readouterr()
    config = json.loads((folder / "relative" / "config.json").read_text())
    config["text_config"]["rope_theta"] = 50.0
    (folder / "relative" / "config.json").write_text(json.dumps(config))
    assert _run("generate", "--model=relative", "--prompt=Hi", "--max_new_tokens=2") == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("mrope_section", 7),
        ("hidden_size", "wide"),
        ("num_hidden_layers", None),
    ],
)
def test_a_wrong_value_in_the_config_is_one_line_and_exit_code_2(folder, capsys, key, value):
    wrong = folder / f"wrong_{key}"
    tiny_checkpoint.write(wrong)
    config = json.loads((wrong / "config.json").read_text())
    inner = config["text_config"]
    (inner["rope_scaling"] if key == "mrope_section" else inner)[key] = value
    (wrong / "config.json").write_text(json.dumps(config))
    for command in (
        ("generate", f"--model={wrong}", "--prompt=Hi"),
        ("convert", f"--from={wrong}", f"--to={folder / 'x'}", "--direction=hf_to_flax"),
        ("upcycle", f"--from={wrong}", f"--to={folder / 'x'}"),
    ):
        assert _run(*command) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_an_upcycled_model_without_noise_answers_as_the_dense_one(folder, capsys):
    upcycle = ["upcycle", f"--from={folder / 'dense'}", f"--to={folder / 'moe'}"]
    assert _run(*upcycle, "--noise_std=0", "--seed=3") == 0
    capsys.readouterr()
    answers = []
    for model in ("dense", "moe"):
        _ask(folder, model)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_a_discriminator_with_its_score_head_survives_both_conversions(folder):
    tiny_checkpoint.write(folder / "judge", num_experts=4, score=True)
    for source, target, direction in (
        ("judge", "judge_flax", "hf_to_flax"),
        ("judge_flax", "judge_back", "flax_to_hf"),
    ):
        convert = ["convert", f"--from={folder / source}", f"--to={folder / target}"]
        assert _run(*convert, f"--direction={direction}") == 0
    first, second = (hf_checkpoints.read(folder / name) for name in ("judge", "judge_back"))
    assert first.keys() == second.keys()
    assert "v_head.1.weight" in first
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_sampling_follows_the_seed(folder, capsys):
    answers = []
    for seed in (0, 0, 1):
        _ask(folder, "dense", extra=["--temperature=1", f"--seed={seed}"])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def _bad_image(root: pathlib.Path) -> str:
    (root / "broken.png").write_bytes((root / "a.png").read_bytes()[:80])
    return "broken.png"


def _thin_image(root: pathlib.Path) -> str:
    return tiny_checkpoint.picture(root, "thin.png", (2010, 10)).name


def _huge_image(root: pathlib.Path) -> str:
    return tiny_checkpoint.picture(root, "huge.png", (8000, 8000)).name


@pytest.mark.parametrize(
    ("make", "told"),
    [(_bad_image, "broken.png"), (_thin_image, "200"), (_huge_image, "pixels")],
)
def test_a_bad_image_is_one_line_and_exit_code_2(folder, capsys, make, told):
    assert _ask(folder, "dense", pictures=(make(folder),)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": "What is <|image_pad|> here?"}, "<|image_pad|>"),
        ({"pictures": ("missing.png",)}, "missing.png"),
        ({"model": "nowhere"}, "nowhere"),
        ({"extra": ["--top_p=2"]}, "top_p"),
        ({"tokens": 0}, "max_new_tokens"),
        ({"extra": ["--seed=99999999999999999999"]}, "seed"),
        ({"extra": ["--temperature=nan"]}, "temperature"),
        ({"extra": ["--attention=splash"]}, "--attention = 'splash' needs a TPU, this is a cpu"),
        ({"extra": ["--attention=cudnn"]}, "--attention = 'cudnn' needs an NVIDIA GPU"),
        ({"prompt": "bad \udcff byte"}, "UTF-8"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(folder, capsys, change, told):
    assert _ask(folder, **({"model": "dense"} | change)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert told in err


def test_a_tokenizer_of_another_checkpoint_is_refused_naming_both_values(folder, capsys):
    other = tiny_checkpoint.write(folder / "other")
    config = json.loads((other / "config.json").read_text())
    was = config["image_token_id"]
    config["image_token_id"] = was + 1
    (other / "config.json").write_text(json.dumps(config))
    assert _ask(folder, "other") == 2
    err = capsys.readouterr().err
    assert str(was) in err
    assert str(was + 1) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "told"), [("splash", "a TPU, this is a cpu"), ("cudnn", "an NVIDIA GPU")]
)
def test_a_stage_refuses_an_attention_that_its_devices_cannot_run(
    folder, tmp_path, capsys, name, told
):
    command = ["sft", "--config=configs/sft.py:tiny", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.model.folder={folder / 'dense'}", "--config.data.train=rows.json"]
    assert _run(*command, f"--config.model.attention={name}") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: config.model.attention = {name!r} needs {told}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ range(10**9) }}", "OverflowError: Range too big"),
        ("{{ 'a' * 10**13 }}", "MemoryError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ raise_exception('no\\nway') }}", "TemplateError: no way"),
        ("{% if", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_fails_is_one_line_and_exit_code_2(
    folder, tmp_path, capsys, template, told
):
    shutil.copytree(folder / "dense", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    assert _run("generate", f"--model={tmp_path / 'model'}", "--prompt=hi") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: chat template: cannot render the messages: ")
    assert told in err


@pytest.fixture(scope="module")
def weights(folder) -> dict[str, np.ndarray]:
    return hf_checkpoints.read(folder / "dense")


def _edited(folder, tmp_path, weights, *, config=(), text=(), tensors=None, keep=()):
    """Write a copy of the dense model with some of it changed."""
    target = tmp_path / "edited"
    shutil.copytree(folder / "dense", target)
    values = json.loads((target / "config.json").read_text())
    values.update(config)
    values["text_config"].update(text)
    (target / "config.json").write_text(json.dumps(values))
    stored = weights | (tensors or {})
    safetensors.numpy.save_file(stored, target / "model.safetensors", {"format": "pt"})
    for name in keep:
        (target / name).write_text("{}")
    return target


_NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tensors": {_NORM: np.full(48, np.nan, np.float32)}}, f"{_NORM}' holds NaN"),
        ({"tensors": {_NORM: np.ones(48, np.int8)}}, "of type I8 are not read"),
        ({"text": {"num_hidden_layers": 1000}}, "num_hidden_layers = 1000, there are"),
        ({"text": {"num_hidden_layers": 10**8}}, "between 1 and 1024, got 100000000"),
        ({"text": {"vocab_size": 10**9}}, "vocab_size = 1000000000, model.language_model.embed"),
        ({"keep": ["adapter_config.json"]}, "merge the adapter into its base"),
        ({"config": {"quantization_config": {"bits": 4}}}, "quantized weights are not read"),
    ],
)
def test_weights_that_no_command_can_use_are_one_line_in_every_command(
    folder, tmp_path, capsys, weights, change, told
):
    model = _edited(folder, tmp_path, weights, **change)
    sft = ["sft", "--config=configs/sft.py:tiny", f"--workdir={tmp_path / 'run'}"]
    sft.append("--config.mesh.num_devices=1")
    rows = tmp_path / "rows.json"
    turns = [("human", "Hi"), ("gpt", "Ho")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    rows.write_text(json.dumps([row] * 8))
    for command in (
        ("generate", f"--model={model}", "--prompt=Hi", "--max_new_tokens=1"),
        ("convert", f"--from={model}", f"--to={tmp_path / 'to'}", "--direction=hf_to_flax"),
        ("upcycle", f"--from={model}", f"--to={tmp_path / 'to'}"),
        (*sft, f"--config.model.folder={model}", f"--config.data.train={rows}"),
    ):
        assert _run(*command) == 2, command[0]
        out, err = capsys.readouterr()
        assert told in err, command[0]
        assert out == "" and err.count("error: ") == 1
        assert err.splitlines()[-1].startswith("error: ")
        assert not (tmp_path / "to").exists()


def test_a_small_file_that_is_none_is_refused_by_name_and_leaves_nothing(folder, tmp_path, capsys):
    shutil.copytree(folder / "dense", tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    (tmp_path / "model" / "tokenizer_config.json").symlink_to("/etc/hostname")
    convert = ["convert", f"--from={tmp_path / 'model'}", f"--to={tmp_path / 'to'}"]
    assert _run(*convert, "--direction=hf_to_flax") == 2
    err = capsys.readouterr().err
    assert "tokenizer_config.json leads out of the folder" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_adapter_alone_is_refused_with_what_to_do(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for command in (
        ("generate", f"--model={tmp_path}", "--prompt=Hi"),
        ("convert", f"--from={tmp_path}", f"--to={tmp_path / 'to'}", "--direction=hf_to_flax"),
        ("upcycle", f"--from={tmp_path}", f"--to={tmp_path / 'to'}"),
    ):
        assert _run(*command) == 2
        assert "merge the adapter" in capsys.readouterr().err


def test_logits_that_are_not_finite_are_no_answer(folder, tmp_path, capsys, weights):
    # Each weight is finite; their product is not.
    model = _edited(folder, tmp_path, weights, tensors={_NORM: np.full(48, 3e38, np.float32)})
    assert _run("generate", f"--model={model}", "--prompt=Hi", "--max_new_tokens=2") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "the logits of this model are not finite" in err


def test_a_missing_tensor_is_named(folder, capsys):
    broken = tiny_checkpoint.write(folder / "broken")
    tensors = hf_checkpoints.read(broken)
    name = "model.language_model.layers.1.self_attn.q_norm.weight"
    tensors.pop(name)
    config = json.loads((broken / "config.json").read_text())
    hf_checkpoints.write_tensors(folder / "less", config, tensors, num_files=1)
    (folder / "less" / "model.safetensors").replace(broken / "model.safetensors")
    assert _ask(folder, "broken") == 2
    assert name in capsys.readouterr().err
