"""Experts and heads that are kept apart stay so through every command and folder."""

import json

import numpy as np
import pytest

from models import kinds
from prism_jax import main
from prism_jax.checkpoints import model_files, pretrained
from tests import hf_checkpoints, tiny_checkpoint
from tests.stages import rl_run, sft_run
from tests.stages.align import align_run

_KEY = {"router": "segment", "heads": 2}
_WARMUP = (
    "--config=configs/warmup.py:tiny",
    "--config.mesh.num_devices=1",
    "--config.train.num_steps=1",
    "--config.evaluate.every_steps=1",
    "--config.rows.row_tokens=1024",
    "--config.data.max_tokens=1024",
)


def _warm_up(root, model, workdir) -> None:
    data = f"--config.data.train={root / 'pairs' / 'pairs.jsonl'}"
    folder = f"--config.model.folder={model}"
    given = ["warmup", *_WARMUP, f"--workdir={workdir}", folder, data]
    assert rl_run.run_arguments(given) == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Upcycle a dense model with experts and heads apart, and warm it up by one step."""
    root = tmp_path_factory.mktemp("kinds")
    with rl_run.compiled_once(tmp_path_factory.mktemp("compiled")):
        rl_run.write(root)
        tiny_checkpoint.write(root / "dense")
        made = ["upcycle", f"--from={root / 'dense'}", f"--to={root / 'moe'}"]
        assert main.main([*made, "--router=segment", "--heads=2"]) == 0
        _warm_up(root, root / "moe", root / "run")
        assert main.main(["export", f"--workdir={root / 'run'}", f"--to={root / 'hf'}"]) == 0
        yield root


def _config(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_upcycle_writes_the_choices_and_a_run_keeps_them(root):
    assert _config(root / "moe")[kinds.KEY] == _KEY
    kept = model_files.of(root / "run", is_discriminator=True)
    assert _config(kept)[kinds.KEY] == _KEY
    saved = sft_run.saved(root / "run")
    assert saved["score/kernel"].shape[1] == 2


def test_the_warm_up_measures_the_panel_of_a_mixture_that_keeps_kinds_apart(root):
    (row,) = rl_run.rows(root / "run")
    # Dedicated experts are as far apart as two segments can be, and each has all its tokens.
    assert row["honesty/router_information_bits_mean"] == pytest.approx(1)
    loads = [row[f"honesty/{n}_expert_{e}_load"] for n in ("caption", "cot") for e in range(4)]
    assert loads == [0.5, 0.5, 0, 0, 0, 0, 0.5, 0.5]
    assert row["honesty/caption_swapped_change"] > 0
    assert row["honesty/caption_blank_image_change"] > 0
    # Both sides end with the same token.
    assert row["honesty/cot_last_token_probe_accuracy"] == 0.5
    assert row["honesty/num_pairs"] == row["eval/num_pairs"]
    for name in ("caption", "cot"):
        assert row[f"honesty/{name}_pair_accuracy"] == row[f"eval/{name}_pair_accuracy"]


@pytest.mark.slow
def test_an_alignment_reads_the_choices_and_its_discriminator_is_exported_with_them(root, tmp_path):
    with align_run.scripted(root / "dense"):
        given = [
            "align",
            "--config=configs/align.py:tiny",
            "--config.mesh.num_devices=1",
            "--config.train.num_steps=1",
            "--config.rollout.num_responses=2",
            "--config.rollout.max_response_tokens=96",
            "--config.prompts.max_prompt_tokens=1024",
            "--config.rows.row_tokens=1024",
            "--config.discriminator.rows.row_tokens=1024",
            f"--workdir={tmp_path / 'run'}",
            f"--config.model.folder={root / 'dense'}",
            f"--config.discriminator.folder={root / 'run'}",
            f"--config.prompts.path={root / 'corpus' / 'align' / 'train.parquet'}",
        ]
        assert rl_run.run_arguments(given) == 0
    for row in rl_run.rows(tmp_path / "run"):
        assert row["honesty/router_information_bits_mean"] == pytest.approx(1)
        assert row["honesty/cot_expert_0_load"] == 0
        assert row["honesty/caption_swapped_change"] > 0
    out = ["export", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'hf'}"]
    assert main.main([*out, "--item=discriminator"]) == 0
    assert _config(tmp_path / "hf")[kinds.KEY] == _KEY
    assert hf_checkpoints.read(tmp_path / "hf")["v_head.1.weight"].shape == (2, 48)
    assert (
        main.main(["export", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'policy'}"]) == 0
    )
    assert kinds.KEY not in _config(tmp_path / "policy")


def test_without_the_choices_a_folder_says_nothing_of_them(root, tmp_path):
    made = ["upcycle", f"--from={root / 'dense'}", f"--to={tmp_path / 'moe'}"]
    assert main.main(made) == 0
    assert kinds.KEY not in _config(tmp_path / "moe")


def test_an_export_has_both_heads_and_is_read_as_it_was(root):
    tensors = hf_checkpoints.read(root / "hf")
    saved = sft_run.saved(root / "run")["score/kernel"]
    assert _config(root / "hf")[kinds.KEY] == _KEY
    assert tensors["v_head.1.weight"].shape == saved.T.shape
    np.testing.assert_allclose(
        tensors["v_head.1.weight"].astype(np.float32), saved.T, rtol=1e-2, atol=1e-4
    )
    source = pretrained.Source.of(root / "hf", role="discriminator")
    assert pretrained.config_of(source.files)[1].score_heads == 2


def test_convert_keeps_the_choices_and_every_bit(root, tmp_path):
    there = ["convert", f"--from={root / 'hf'}", f"--to={tmp_path / 'flax'}"]
    assert main.main([*there, "--direction=hf_to_flax"]) == 0
    back = ["convert", f"--from={tmp_path / 'flax'}", f"--to={tmp_path / 'back'}"]
    assert main.main([*back, "--direction=flax_to_hf"]) == 0
    assert _config(tmp_path / "back") == _config(root / "hf")
    before, after = hf_checkpoints.read(root / "hf"), hf_checkpoints.read(tmp_path / "back")
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}


@pytest.mark.parametrize("command", ["generate", "align"])
def test_a_mixture_that_routes_by_segment_is_refused_as_a_policy(root, tmp_path, capsys, command):
    given = {
        "generate": [f"--model={root / 'moe'}", "--prompt=x"],
        "align": [
            "--config=configs/align.py:tiny",
            "--config.mesh.num_devices=1",
            f"--workdir={tmp_path / 'run'}",
            f"--config.model.folder={root / 'moe'}",
            f"--config.discriminator.folder={root / 'run'}",
            f"--config.prompts.path={root / 'corpus' / 'align' / 'train.parquet'}",
        ],
    }
    assert rl_run.run_arguments([command, *given[command]]) == 2
    assert "a discriminator's trunk and no policy" in capsys.readouterr().err


def test_a_head_of_another_size_than_config_json_says_is_refused(root, tmp_path, capsys):
    values = _config(root / "hf")
    values[kinds.KEY] = _KEY | {"heads": 1}
    (root / "hf" / "config.json").write_text(json.dumps(values))
    try:
        given = ["convert", f"--from={root / 'hf'}", f"--to={tmp_path / 'flax'}"]
        assert main.main([*given, "--direction=hf_to_flax"]) == 2
        assert "v_head.1.weight [2, 48] instead of [1, 48]" in capsys.readouterr().err
    finally:
        values[kinds.KEY] = _KEY
        (root / "hf" / "config.json").write_text(json.dumps(values))
