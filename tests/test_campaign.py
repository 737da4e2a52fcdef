"""The campaign: its policies, its order, its resumption, its budgets and its arithmetic."""

import importlib

import pytest

from benchmarks import campaign, campaign_policies
from prism_jax import configuration, main


def _policies(size):
    config = campaign.seed_chain(size, 3, "BASE", ())
    return campaign_policies.Campaign(config).policies()


@pytest.fixture(scope="module", params=["demo", "small"])
def parsed(request, tmp_path_factory):
    """Return each step of a seed with its parsed configuration, by name."""
    folder = tmp_path_factory.mktemp("seed")
    found = {}
    for step in campaign_policies.steps_of(_policies(request.param)):
        command, *arguments = step.command(folder)
        module = importlib.import_module(f"prism_jax.{main.COMMANDS[command][0]}")
        if command in ("data", "upcycle"):
            module.parser().parse_args(arguments)
            continue
        config, _ = configuration.read(arguments, command=command)
        if command in ("sft", "warmup", "align", "rlvr"):
            module = importlib.import_module(f"prism_jax.stages.{command}.config")
        found[step.name] = configuration.parse(module.Config, config)
    return found


def test_every_step_of_every_policy_is_a_command_that_takes_its_arguments(parsed):
    assert len(parsed) > 60
    assert parsed["align_text_only"].discriminator.sees_images is False
    assert parsed["align_whole"].discriminator.view == "whole"
    assert parsed["warmup_dense"].model.folder == "BASE"
    assert parsed["sft_dapo"].groups.keep == "accuracy"
    assert parsed["prism_gspo"].algorithm.loss == "gspo"
    assert parsed["adversary_grpo"].adversary.end_coefficient == 0
