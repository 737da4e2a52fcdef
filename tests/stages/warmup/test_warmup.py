"""Warm-up by its command: it learns, holds prompts out, starts from several trunks, resumes."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from prism_jax.data import processor, records
from prism_jax.discriminator import segments
from prism_jax.running import metric_writers
from prism_jax.training import train_step
from tests import hf_checkpoints, tiny_checkpoint
from tests.models import cases
from tests.stages import rl_run, sft_run

_LEARN = (
    "--config.train.num_steps=6",
    "--config.train.num_pairs=4",
    "--config.evaluate.every_steps=6",
    "--config.checkpoint.save_every_steps=2",
    "--config.optim.peak=0.01",
    "--config.optim.warmup_fraction=0.0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with rl_run.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield rl_run.write(tmp_path_factory.mktemp("warmup"), has_videos=True)


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    """Train six steps without interruption; note how often the step was compiled."""
    workdir = tmp_path_factory.mktemp("learned")
    made = []
    make = train_step.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train_step, "make_train_step", lambda *a, **k: made.append(make(*a, **k)) or made[-1]
        )
        assert rl_run.run("warmup", folder, workdir, *_LEARN) == 0
    return workdir, [step._cache_size() for step in made]


def test_the_discriminator_learns_to_prefer_the_teacher_on_prompts_it_never_saw(learned):
    rows = rl_run.rows(learned[0])
    assert rows[-1]["loss/total"] < 0.7 * rows[0]["loss/total"]
    assert rows[-1]["eval/num_pairs"] >= 2
    assert rows[-1]["eval/caption_pair_accuracy"] == rows[-1]["eval/cot_pair_accuracy"] == 1


def test_a_run_compiles_its_step_once(learned):
    assert learned[1] == [1]


def test_a_run_stopped_by_sigterm_goes_on_bit_for_bit(folder, learned, tmp_path):
    write = metric_writers.JsonLines.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric_writers.JsonLines, "write", write_and_stop)
        assert rl_run.run("warmup", folder, tmp_path, *_LEARN) == 143
    assert rl_run.run("warmup", folder, tmp_path, *_LEARN) == 0
    assert sft_run.checksums(tmp_path) == sft_run.checksums(learned[0])
    assert rl_run.rows(tmp_path) == rl_run.rows(learned[0])


_PRETRAINED = (
    "--config=configs/warmup.py:tiny",
    "--config.mesh.num_devices=1",
    "--config.train.num_steps=1",
    "--config.evaluate.every_steps=None",
    "--config.rows.row_tokens=1024",
    "--config.data.max_tokens=1024",
)


def _warm_up(folder, model, workdir, *overrides):
    """Run the command on the pairs from a folder with weights."""
    data = f"--config.data.train={folder / 'pairs' / 'pairs.jsonl'}"
    return rl_run.run_arguments(
        [
            "warmup",
            *_PRETRAINED,
            f"--workdir={workdir}",
            f"--config.model.folder={model}",
            data,
            *overrides,
        ]
    )


def test_a_trunk_of_experts_gets_a_new_head_and_balances_its_router(folder, tmp_path, capsys):
    model = tiny_checkpoint.write(tmp_path / "moe", num_experts=4)
    assert _warm_up(folder, model, tmp_path / "run") == 0
    assert "the score head is new" in capsys.readouterr().err
    (row,) = rl_run.rows(tmp_path / "run")
    # Two experts a token: 2 is the least.
    balance = row["discriminator/router_balance"]
    assert balance > 2
    parts = row["discriminator/caption_loss"] + row["discriminator/cot_loss"]
    assert row["loss/total"] == pytest.approx(parts / 2 + 0.01 * balance, rel=1e-5)


def test_a_discriminator_is_trained_further_with_its_head(folder, tmp_path, capsys):
    model = tiny_checkpoint.write(tmp_path / "scored", score=True)
    assert _warm_up(folder, model, tmp_path / "run", "--config.optim.peak=1e-9") == 0
    assert "the score head is new" not in capsys.readouterr().err
    # The rate is too small to move a weight: the head is the one of the folder.
    found = sft_run.saved(tmp_path / "run")["score/kernel"]
    expected = cases.weight("v_head.1.weight", found.T.shape).T
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_text_only_discriminator_reads_no_picture(folder, tmp_path):
    blind = ("--config.train.num_steps=1", "--config.data.sees_images=False")
    blind += ("--config.optim.frozen=trunk/vision/.*",)
    found = []
    for name in ("as_it_is", "other_pictures"):
        copied = tmp_path / name
        shutil.copytree(folder / "pairs", copied / "pairs")
        if name == "other_pictures":
            for path in (copied / "pairs").glob("*.png"):
                Image.new("RGB", (40, 40)).save(path)
        data = f"--config.data.train={copied / 'pairs' / 'pairs.jsonl'}"
        held = "--config.data.held_out_fraction=0.0"
        assert rl_run.run("warmup", folder, copied / "run", *blind, data, held) == 0
        found.append(rl_run.rows(copied / "run"))
    assert found[0] == found[1]


def test_a_text_only_trunk_reads_prompts_with_the_tokenizer_of_the_policy(folder, tmp_path, capsys):
    policy = _with_config(folder)
    vocabulary = json.loads((policy / "config.json").read_text())["text_config"]["vocab_size"]
    config = hf_checkpoints.config_json(
        "text", tied=True, vocab_size=vocabulary, num_hidden_layers=1
    )
    shapes = hf_checkpoints.shapes(config, layout="4.57")
    tensors = {name: cases.weight(name, shape) for name, shape in shapes.items()}
    trunk = hf_checkpoints.write_tensors(tmp_path / "qwen3", config, tensors, num_files=1)
    chosen = (f"--config.data.words={policy}", "--config.optim.no_decay=('.*/scale',)")
    blind = "--config.data.sees_images=False"
    assert _warm_up(folder, trunk, tmp_path / "run", *chosen, blind) == 0
    (row,) = rl_run.rows(tmp_path / "run")
    assert row["discriminator/caption_loss"] > 0
    assert sft_run.saved(tmp_path / "run")["score/kernel"].shape == (config["hidden_size"], 1)
    capsys.readouterr()
    assert _warm_up(folder, trunk, tmp_path / "seeing", *chosen) == 2
    assert "sees_images must be False" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("caption", "cot", "told"),
    [
        ("<caption>a</caption>", "<think>b</think><answer>c", "format"),
        ("a", "<think>b</think><answer>c</answer>", "format"),
    ],
)
def test_a_malformed_side_is_a_wrong_row_that_is_named(
    folder, tmp_path, capsys, caption, cot, told
):
    text = (folder / "pairs" / "pairs.jsonl").read_text().splitlines()
    row = json.loads(text[0]) | {"student_caption": caption, "student_cot": cot}
    (folder / "pairs" / "wrong.jsonl").write_text("\n".join([json.dumps(row), *text[1:]]) + "\n")
    wrong = f"--config.data.train={folder / 'pairs' / 'wrong.jsonl'}"
    assert rl_run.run("warmup", folder, tmp_path, wrong) == 2
    err = capsys.readouterr().err
    assert f"1 of 12 rows are wrong, config.data.max_bad_rows is 0; {told} 1" in err


def test_teacher_and_student_are_cut_and_scored_by_one_rule(folder):
    words = processor.Processor.from_folder(_with_config(folder))
    form = segments.Form(view="caption_cot", scored_token="last", teacher_max_tokens=None)
    reader = segments.Reader(words, vocab_tokens=None, gate="strict", form=form)
    whole = "<caption>a</caption>\n<think>b</think><answer>c</answer>"
    one = reader.teacher(segments.Text.of_whole(whole))
    assert words.decode(one.tokens["caption"]) == "<caption>a</caption>"
    assert one.tokens["cot"][-1] == words.tokenizer.eos_token_id
    parts = segments.Text.of_parts("<caption>a</caption>", "<think>b</think><answer>c</answer>")
    for cut in (reader.teacher(parts), reader.student(parts)):
        for name in ("caption", "cot"):
            np.testing.assert_array_equal(cut.tokens[name], one.tokens[name])
    assert segments.join("<caption>a</caption>\n", "<think>") == "<caption>a</caption>\n<think>"
    with pytest.raises(records.RowError, match="not of the strict format"):
        reader.teacher(segments.Text.of_whole("<caption>a</caption><think>b</think>"))


def _with_config(folder):
    """Return a folder with the tokenizer that a processor can be read from."""
    workdir = folder / "read"
    if not workdir.exists():
        tiny_checkpoint.write(workdir)
    return workdir
