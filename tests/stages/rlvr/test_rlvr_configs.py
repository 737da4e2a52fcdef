"""RLVR's configurations: algorithms have their published numbers, `official` those of scripts."""

import importlib

import pytest

from prism_jax import configuration
from prism_jax.stages.rlvr import config as rlvr_config

_ALGORITHMS = ("grpo", "dapo", "gspo", "dr_grpo", "cispo", "rloo", "reinforce++")
_OFFICIAL = ("grpo", "dapo", "gspo")


def _options(arg, *overrides):
    argv = [f"--config=configs/rlvr.py:{arg}", "--workdir=none", "--config.model.folder=none"]
    argv += ["--config.prompts.path=none", *(f"--config.{one}" for one in overrides)]
    config, _ = configuration.read(argv, command="rlvr")
    return configuration.parse(rlvr_config.Config, config)


def _differences(one, other, place=""):
    """Return the fields in which two configurations differ."""
    found = {}
    for name, value in vars(one).items():
        if isinstance(value, configuration.Section):
            found |= _differences(value, vars(other)[name], f"{place}{name}.")
        elif value != vars(other)[name]:
            found[f"{place}{name}"] = vars(other)[name]
    return found


@pytest.mark.parametrize("size", ["tiny", "tiny,new", "demo", "small,new", "4b", "8b"])
@pytest.mark.parametrize("name", _ALGORITHMS)
def test_every_algorithm_is_whole_in_every_size(size, name):
    _options(f"{size},{name}")


def test_an_algorithm_is_grpo_and_the_few_lines_that_differ():
    base = _options("4b")
    assert _differences(base, _options("4b,grpo")) == {}
    assert _differences(base, _options("4b,dapo")) == {
        "algorithm.clip_high": 0.28,
        "algorithm.dual_clip": 10.0,
        "groups.keep": "accuracy",
        "groups.generation_prompts": 96,
        "groups.max_generations": 10,
        "groups.surplus_steps": 1,
        "overlong.buffer_tokens": 4096,
        "overlong.penalty_factor": 1.0,
    }
    assert _differences(base, _options("4b,gspo")) == {
        "algorithm.loss": "gspo",
        "algorithm.clip_low": 3e-4,
        "algorithm.clip_high": 4e-4,
        "algorithm.aggregation": "seq-mean-token-mean",
    }
    assert _differences(base, _options("4b,dr_grpo")) == {
        "advantage.kind": "dr_grpo",
        "advantage.eps": None,
        "algorithm.aggregation": "seq-mean-token-sum-norm",
        "algorithm.norm_tokens": 8192,
    }
    assert _differences(base, _options("4b,cispo")) == {
        "algorithm.loss": "cispo",
        "algorithm.clip_low": None,
        "algorithm.clip_high": 1.0,
    }
    assert _differences(base, _options("4b,rloo")) == {
        "advantage.kind": "rloo",
        "advantage.eps": None,
        "algorithm.loss": "reinforce",
        "algorithm.clip_low": None,
        "algorithm.clip_high": None,
        "algorithm.aggregation": "seq-mean-token-sum",
    }
    assert _differences(base, _options("4b,reinforce++")) == {
        "advantage.kind": "reinforce++",
        "advantage.eps": 1e-8,
        "advantage.discount": 1.0,
    }


def test_official_is_what_the_scripts_did():
    judge = {"rewards.judge": "official", "optim.no_decay": ()}
    means = {"algorithm.aggregation": "official"}
    assert _differences(_options("4b"), _options("4b,official")) == judge | means | {
        "algorithm.dual_clip": 3.0
    }
    assert _differences(_options("4b,dapo"), _options("4b,dapo,official")) == judge | means | {
        "groups.surplus_steps": 0,
        "optim.warmup_fraction": None,
        "optim.warmup_steps": 10,
        "optim.weight_decay": 0.1,
    }
    assert _differences(_options("8b,gspo"), _options("8b,gspo,official")) == judge | {
        "optim.warmup_fraction": 0.05,
        "optim.weight_decay": 0.1,
    }


def test_every_released_run_takes_one_update_of_a_rollout_without_a_reference():
    for name in _OFFICIAL:
        options = _options(f"4b,{name},official")
        assert options.train.num_updates == 1
        assert not options.reference.is_used
        assert options.algorithm.sampler_weights == "off"


def test_lengths_that_follow_from_the_rollout_follow_its_overrides():
    options = _options("4b,dapo", "rollout.max_response_tokens=1000", "rollout.num_prompts=8")
    assert options.overlong.buffer_tokens == 500
    assert options.groups.generation_prompts == 24
    options = _options("4b,dr_grpo", "rollout.max_response_tokens=1000")
    assert options.algorithm.norm_tokens == 1000
    assert _options("4b,dapo", "overlong.buffer_tokens=7").overlong.buffer_tokens == 7


def test_a_kl_term_needs_one_field():
    options = _options("4b", "reference.loss_coefficient=0.001")
    assert options.reference.is_used
    assert (options.reference.loss.estimator, options.reference.loss.coefficient) == ("k3", 0.001)


@pytest.mark.parametrize(
    ("arg", "told"),
    [
        ("4b,dapo,gspo", "at most one algorithm"),
        ("4b,rloo,official", "no released run"),
        ("4b,ppo", "options are"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arg, told):
    with pytest.raises(ValueError, match=told):
        importlib.import_module("configs.rlvr").get_config(arg)
