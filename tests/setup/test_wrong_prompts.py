"""Prompts that a stage cannot learn from: too few for a step, or wrong rows, each named."""

import json

import pyarrow.parquet
import pytest

from prism_jax import errors
from prism_jax.setup import corpora
from tests.stages import rl_run

_REFILL = (
    "--config.groups.keep=accuracy",
    "--config.groups.max_generations=2",
    "--config.groups.surplus_steps=0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rl_run.write(tmp_path_factory.mktemp("prompts"))


@pytest.mark.parametrize(
    ("stage", "overrides", "field", "num_rows"),
    [
        ("align", ("--config.rollout.num_prompts=6",), "rollout.num_prompts", 5),
        ("rlvr", ("--config.rollout.num_prompts=6",), "rollout.num_prompts", 5),
        (
            "rlvr",
            (*_REFILL, "--config.groups.generation_prompts=6"),
            "groups.generation_prompts",
            5,
        ),
        (
            "rlvr",
            ("--config.rollout.num_prompts=4", "--config.prompts.max_rows=3"),
            "rollout.num_prompts",
            3,
        ),
    ],
)
def test_fewer_prompts_than_a_step_takes_are_refused(
    folder, tmp_path, capsys, stage, overrides, field, num_rows
):
    assert rl_run.run(stage, folder, tmp_path, *overrides) == 2
    told = f"train: config.{field} must be at most the {num_rows} rows there are to learn from"
    assert told in capsys.readouterr().err


def test_a_malformed_teacher_is_a_wrong_row_that_is_listed(folder, tmp_path, capsys):
    table = pyarrow.parquet.read_table(folder / "corpus" / "align" / "train.parquet")
    rows = table.to_pylist()
    rows[1]["teacher_cot"] = "<think>no answer</think>"
    path = tmp_path / "wrong.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), path)
    workdir = tmp_path / "run"
    assert rl_run.run("align", folder, workdir, f"--config.prompts.path={path}") == 2
    told = capsys.readouterr().err
    assert "1 of 5 rows are wrong, config.prompts.max_bad_rows is 0; format 1" in told
    (listed,) = (json.loads(line) for line in (workdir / "dropped_prompts.jsonl").open())
    assert (listed["row"], listed["reason"], listed["file"]) == (2, "format", "wrong.parquet")
    assert "left out: wrong.parquet row 2" in told


def test_a_data_set_smaller_than_a_batch_is_refused():
    corpora.require_batch(8, 8, name="train", field="num_rows")
    told = "train: num_rows must be at most the 7 rows there are to learn from, got 8"
    with pytest.raises(errors.InputError, match=told):
        corpora.require_batch(7, 8, name="train", field="num_rows")
