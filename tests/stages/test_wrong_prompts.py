"""Prompts that a stage cannot learn from: too few for a step."""

import pytest

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
