"""Supervised fine-tuning by its command: equivalences, resuming, what it trains and refuses."""

import json
import os
import re
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from models import moe
from prism_jax import errors
from prism_jax.checkpoints import checkpoint
from prism_jax.running import metric_writers
from prism_jax.stages.sft import feed as sft_feed
from prism_jax.stages.sft import step as sft_step
from prism_jax.training import optimizer_step, train_step
from tests import data_files, tiny_checkpoint
from tests.stages import sft_run

ONE_STEP = (
    "--config.train.num_steps=1",
    "--config.optim.warmup_fraction=None",
    "--config.optim.warmup_steps=0",
    "--config.checkpoint.save_every_steps=9",
)
FOUR_ROWS = ("--config.train.step_rows=4", "--config.train.num_rows=4")
A_ROW_A_PART = ("--config.train.num_rows=-1",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sft_run.write(tmp_path_factory.mktemp("sft"), num_rows=4)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Take one step over all four rows, packed into one row of tokens."""
    workdir = tmp_path_factory.mktemp("whole")
    assert sft_run.run(folder, workdir, *ONE_STEP, *FOUR_ROWS) == 0
    return workdir


def _assert_same_step(workdir, other):
    (row,), (expected,) = sft_run.rows(workdir), sft_run.rows(other)
    assert row["data/target_tokens"] == expected["data/target_tokens"]
    for name in ("loss/nll", "loss/total", "optim/grad_norm"):
        assert row[name] == pytest.approx(expected[name], rel=1e-5), name
    first, second = sft_run.saved(workdir), sft_run.saved(other)
    assert first.keys() == second.keys()
    for name in first:
        # Adam divides each gradient by its own size, so that rounding shows at the scale of a step.
        np.testing.assert_allclose(first[name], second[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "overrides",
    [
        ("--config.train.step_rows=4", "--config.train.num_rows=2"),
        (*FOUR_ROWS, "--config.data.row_examples=1"),
        ("--config.train.step_rows=4", *A_ROW_A_PART, "--config.mesh.num_devices=3"),
        (
            *("--config.train.step_rows=4", *A_ROW_A_PART, "--config.mesh.num_devices=8"),
            "--config.mesh.axes.data=1",
            "--config.mesh.axes.fsdp=2",
            "--config.mesh.axes.sequence=2",
            "--config.mesh.axes.tensor=2",
        ),
        # Rows that hold several examples with pictures, a quarter of each row on a device.
        (*FOUR_ROWS, "--config.mesh.num_devices=4", "--config.mesh.axes.sequence=4"),
        (
            *FOUR_ROWS,
            "--config.train.head=recompute",
            "--config.train.head_chunk_tokens=16",
            "--config.model.remat=full",
        ),
    ],
    ids=[
        "accumulated",
        "unpacked",
        "three_devices",
        "eight_devices",
        "quarters_of_rows",
        "memory_saved",
    ],
)
def test_the_same_step_however_it_is_computed(folder, whole, tmp_path, overrides):
    assert sft_run.run(folder, tmp_path, *ONE_STEP, *overrides) == 0
    _assert_same_step(tmp_path, whole)


def test_moments_in_the_hosts_memory_give_the_step_and_are_saved_and_restored(
    folder, whole, tmp_path, monkeypatch
):
    save, step = checkpoint.Checkpointer.save, optimizer_step.Streamed.__call__
    savers, idle = [], []

    def noting_save(saver, *args, **kwargs):
        savers.append(saver)
        save(saver, *args, **kwargs)

    def noting_step(*args):
        idle.append(not any(saver._manager.is_saving_in_progress() for saver in savers))
        return step(*args)

    monkeypatch.setattr(checkpoint.Checkpointer, "save", noting_save)
    monkeypatch.setattr(optimizer_step.Streamed, "__call__", noting_step)
    options = (*FOUR_ROWS, "--config.optim.memory=host")
    assert sft_run.run(folder, tmp_path / "one", *ONE_STEP, *options) == 0
    _assert_same_step(tmp_path / "one", whole)
    two = ("--config.train.num_steps=2", "--config.checkpoint.save_every_steps=1", *options)
    assert sft_run.run(folder, tmp_path / "two", *two) == 0
    # A save reads the moments where they are, and the next step frees them.
    assert idle == [True] * 3
    before = sft_run.checksums(tmp_path / "two")
    assert sft_run.run(folder, tmp_path / "two", *two, "--config.resume.step=1") == 0
    assert (tmp_path / "two" / "set_aside" / "2").is_dir()
    assert sft_run.checksums(tmp_path / "two") == before


def test_moments_in_8_bits_are_saved_and_restored_bit_for_bit(folder, tmp_path):
    moments = [f"--config.optim.{name}_dtype=8bit" for name in ("mu", "nu")]
    two = ("--config.train.num_steps=2", "--config.checkpoint.save_every_steps=1", *FOUR_ROWS)
    options = (*two, *moments, "--config.optim.rounding=stochastic")
    assert sft_run.run(folder, tmp_path, *options) == 0
    before = sft_run.checksums(tmp_path)
    types = {leaf["dtype"] for leaf in before["opt_state"].values()}
    assert {"int8", "uint8"} <= types
    assert sft_run.run(folder, tmp_path, *options, "--config.resume.step=1") == 0
    assert (tmp_path / "set_aside" / "2").is_dir()
    assert sft_run.checksums(tmp_path) == before


def test_all_assistant_tokens_and_no_others_are_targets(folder, whole):
    rows = json.loads((folder / "train.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(whole / "model" / "tokenizer.json"))
    texts = [row["messages"][1]["content"] + "<|im_end|>" for row in rows]
    expected = sum(len(tokenizer.encode(text).ids) for text in texts)
    assert sft_run.rows(whole)[0]["data/target_tokens"] == expected
    assert sft_run.rows(whole)[0]["data/examples"] == len(rows)


@pytest.fixture(scope="module")
def steady(folder, tmp_path_factory):
    """Train five steps without interruption; note how often the step was compiled."""
    workdir = tmp_path_factory.mktemp("steady")
    made = []
    make = train_step.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train_step, "make_train_step", lambda *a, **k: made.append(make(*a, **k)) or made[-1]
        )
        assert sft_run.run(folder, workdir, *_FIVE) == 0
    return workdir, [step._cache_size() for step in made]


_FIVE = (
    "--config.train.num_steps=5",
    "--config.train.step_rows=1",
    "--config.train.num_rows=1",
    "--config.data.row_examples=2",
    "--config.checkpoint.save_every_steps=2",
    "--config.evaluate.every_steps=5",
)


def test_a_run_compiles_its_step_once(steady):
    assert steady[1] == [1]


def test_a_run_stopped_by_sigterm_goes_on_bit_for_bit(
    folder, steady, tmp_path, monkeypatch, capsys
):
    write = metric_writers.JsonLines.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metric_writers.JsonLines, "write", write_and_stop)
        assert sft_run.run(folder, tmp_path, *_FIVE) == 143
    assert not (tmp_path / "finished.json").exists()
    assert len(sft_run.rows(tmp_path)) < 5
    capsys.readouterr()
    start = f"--config.model.folder={tmp_path}"
    assert sft_run.run(folder, tmp_path / "next", *ONE_STEP, start, is_new=False) == 2
    assert "this run has not finished" in capsys.readouterr().err
    assert sft_run.run(folder, tmp_path, *_FIVE) == 0
    assert sft_run.checksums(tmp_path) == sft_run.checksums(steady[0])
    assert sft_run.rows(tmp_path) == sft_run.rows(steady[0])


def test_a_finished_run_is_left_alone_and_goes_back_when_asked(folder, steady, capsys, tmp_path):
    before = sft_run.checksums(steady[0])
    capsys.readouterr()
    assert sft_run.run(folder, steady[0], *_FIVE) == 0
    assert "finished after 5 steps already" in capsys.readouterr().err
    assert sft_run.run(folder, steady[0], *_FIVE, "--config.resume.step=4") == 0
    assert (steady[0] / "set_aside" / "5").is_dir()
    assert sft_run.checksums(steady[0]) == before


def test_a_run_goes_on_with_the_same_batch_on_other_devices(folder, steady, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(steady[0], workdir)
    others = ("--config.resume.step=4", *A_ROW_A_PART, "--config.mesh.num_devices=3")
    capsys.readouterr()
    assert sft_run.run(folder, workdir, *_FIVE, *others) == 0
    assert "2 of 3 rows of a step stay empty" in capsys.readouterr().err
    found, expected = sft_run.rows(workdir)[-1], sft_run.rows(steady[0])[-1]
    for name in ("loss/nll", "data/target_tokens", "data/examples", "optim/grad_norm", "eval/nll"):
        if name in expected:
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("changed", ["train.json", "0.png"])
def test_other_rows_of_the_same_number_do_not_continue_a_run(folder, steady, capsys, changed):
    path = folder / changed
    before = path.read_bytes()
    if changed == "train.json":
        path.write_text(json.dumps(json.loads(before)[::-1]))
    else:
        path.write_bytes(data_files.png(9))
    try:
        assert sft_run.run(folder, steady[0], *_FIVE, "--config.resume.step=4") == 2
    finally:
        path.write_bytes(before)
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"error: cannot resume: data rows of config\.data\.train was [0-9a-f]{16} when the "
        r"checkpoint was written and is [0-9a-f]{16} now",
        told,
    )


def test_another_configuration_does_not_continue_a_run(folder, steady, capsys):
    assert sft_run.run(folder, steady[0], *_FIVE, "--config.optim.peak=0.5") == 2
    assert "config.optim.peak: 0.001 in the checkpoint, 0.5 here" in capsys.readouterr().err


def test_a_frozen_tower_stays_and_the_rest_learns_from_a_finished_run(folder, whole, tmp_path):
    assert (
        sft_run.run(
            folder,
            tmp_path,
            f"--config.model.folder={whole}",
            "--config.optim.frozen=vision/.*",
            "--config.optim.peak=0.003",
            f"--config.data.held_out={folder / 'train.json'}",
            "--config.train.num_steps=30",
            *FOUR_ROWS,
            "--config.evaluate.every_steps=30",
            "--config.checkpoint.save_every_steps=99",
            is_new=False,
        )
        == 0
    )
    before, after = sft_run.saved(whole), sft_run.saved(tmp_path)
    for name in before:
        is_same = np.array_equal(before[name], after[name])
        assert is_same == name.startswith("vision/"), name
    assert not any("vision" in name for name in sft_run.saved(tmp_path, "opt_state"))
    rows = sft_run.rows(tmp_path)
    # All four demonstrations are in every step: what is held out here is what is trained on.
    assert rows[-1]["eval/target_tokens"] == rows[0]["data/target_tokens"]
    assert rows[-1]["eval/nll"] < 0.7 * rows[0]["loss/nll"]
    assert rows[-1]["eval/nll"] == pytest.approx(rows[-1]["loss/nll"], rel=0.05)


def test_a_mixture_of_experts_learns_with_the_routers_term(folder, tmp_path, capsys):
    model = tiny_checkpoint.write(tmp_path / "moe", num_experts=4)
    coefficient = "--config.train.load_balance=0.5"
    start = (f"--config.model.folder={model}", coefficient)
    assert sft_run.run(folder, tmp_path / "run", *ONE_STEP, *start, is_new=False) == 0
    (told,) = sft_run.rows(tmp_path / "run")
    # Two of four experts a token: the term is at least two.
    assert told["loss/load_balance"] >= 2
    # The busiest expert has an even share, half of the tokens, or up to all of them.
    assert 1 <= told["router/load"] <= 2
    expected = told["loss/nll"] + 0.5 * told["loss/load_balance"]
    assert told["loss/total"] == pytest.approx(expected, rel=1e-6)
    # It is a mean over microbatches: with it their split is a part of the training.
    other = ("--config.train.num_rows=1", "--config.train.num_steps=2")
    other += ("--config.resume.allow_mismatch=True",)
    assert sft_run.run(folder, tmp_path / "run", *ONE_STEP, *start, *other, is_new=False) == 2
    assert "rows of a microbatch, which a router's term and dropout depend on, was 2" in (
        capsys.readouterr().err
    )


def test_the_load_is_that_of_the_busiest_expert_over_an_even_share():
    router = moe.RouterStats(
        choices=jnp.array([[6.0, 2, 0, 0], [2, 2, 2, 2]]),  # of 4 tokens, 2 experts each
        probability=jnp.ones((2, 4)),
        tokens=jnp.full(2, 4.0),
    )
    load = sft_step._largest_load(router, jnp.float32(4))
    # 6 over 2 in the first layer, 1 in the second.
    assert float(load.total / load.weight) == 2


def test_rows_that_fit_no_packed_row_are_counted_or_refused(folder, tmp_path, capsys):
    short = ("--config.data.row_tokens=58", *ONE_STEP)
    assert sft_run.run(folder, tmp_path / "error", *short) == 2
    told = capsys.readouterr().err
    assert "config.data.max_bad_rows is 0" in told
    assert "tokens, the limit is 58" in told
    assert sft_run.run(folder, tmp_path / "filter", *short, "--config.data.overlong=filter") == 0
    told = capsys.readouterr().err
    dropped = (tmp_path / "filter" / "dropped_train.jsonl").read_text().splitlines()
    assert 1 <= len(dropped) < 4
    assert f"{4 - len(dropped)} of 4 rows; left out: overlong {len(dropped)}" in told
    assert all(json.loads(line)["reason"] == "overlong" for line in dropped)


@pytest.mark.parametrize(
    ("overrides", "is_enough"),
    [
        (("--config.train.step_rows=5",), False),
        (("--config.train.step_rows=4", "--config.train.num_rows=3"), True),
    ],
)
def test_fewer_demonstrations_than_rows_in_a_step_are_refused(
    folder, tmp_path, capsys, monkeypatch, overrides, is_enough
):
    def opened(*_, **__):
        raise errors.InputError("the data is right")

    monkeypatch.setattr(sft_feed.Feed, "train", opened)
    assert sft_run.run(folder, tmp_path, *ONE_STEP, *overrides) == 2
    told = capsys.readouterr().err
    refused = "train: config.train.step_rows must be at most the 4 rows"
    assert (refused in told) != is_enough
    assert ("the data is right" in told) == is_enough


def test_the_rows_of_a_refused_set_are_all_in_the_workdir(folder, tmp_path, capsys):
    rows = json.loads((folder / "train.json").read_text())
    many = [rows[0] | {"id": f"m{i}", "images": ["none.png"]} for i in range(105)]
    (folder / "wrong.json").write_text(json.dumps([*rows, *many]))
    train = f"--config.data.train=({str(folder / 'train.json')!r},{str(folder / 'wrong.json')!r})"
    short = ("--config.data.row_tokens=58", "--config.data.overlong=filter")
    assert sft_run.run(folder, tmp_path, *ONE_STEP, *short, train) == 2
    *_, last_row, more, error = capsys.readouterr().err.splitlines()
    listed = [json.loads(line) for line in (tmp_path / "dropped_train.jsonl").open()]
    assert [row["id"] for row in listed[-105:]] == [f"m{i}" for i in range(105)]
    # What was left out of the first set is there too, and was told before.
    (first,) = {row["file"] for row in listed} - {"wrong.json"}
    assert first == "train.json"
    assert last_row.startswith("left out: wrong.json row ")
    num_wrong = sum(row["file"] == "wrong.json" for row in listed)
    assert more == f"left out: {num_wrong - 100} more; {tmp_path}/dropped_train.jsonl names all"
    assert "105 of 109 rows are wrong, config.data.max_bad_rows is 0" in error
    assert len(error) < 300


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--config.data.train=nowhere.json", "nowhere.json"),
        ("--config.model.folder=nowhere", "nowhere"),
        ("--config.train.num_rows=3", "a multiple of 2 such as 2 or 4, got 3"),
        ("--config.optim.frozen=visoin/.*", "visoin"),
        ("--config.model.sizes.head_dim=12", "head_dim must be a multiple of 8"),
        ("--config.mesh.num_devices=99", "num_devices = 99"),
        (
            "--config.mesh.axes.sequence=2 --config.data.row_tokens=127",
            "a multiple of 2 for 2 parts along mesh.axes.sequence, got 127; 128 would do",
        ),
        ("--config.train.num_epochs=1", "exactly one must be given"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(folder, tmp_path, capsys, override, told):
    devices = "--config.mesh.num_devices=2"
    assert sft_run.run(folder, tmp_path / "run", devices, *override.split(" ")) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ")
    assert told in err[-1]
    assert not (tmp_path / "run" / "lock.json").exists()
