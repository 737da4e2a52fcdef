"""Responses drawn in slots: the same whatever their number, and compiled once."""

import importlib

import jax
import numpy as np
import pytest

from prism_jax import configuration, errors
from prism_jax.data import encode
from prism_jax.policy import rollouts
from prism_jax.rollout import decode, engine, prefill
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import feed as rlvr_feed
from prism_jax.stages.rlvr import main as rlvr_main
from tests.stages import rl_run

_NUM_PROMPTS, _NUM_RESPONSES = 5, 2


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Open a narrow new policy and five prompts."""
    folder = rl_run.write(tmp_path_factory.mktemp("rollouts"))
    options = _options(folder, {})
    devices = devices_lib.open_devices(options.mesh, options.model)
    files = setup_models.keep_files(options.model, folder)
    model = setup_models.open_model(options.model, devices, files=files, is_discriminator=False)
    optimizer = setup_models.make_optimizer(options.optim, model.params, num_steps=1)
    start = setup_models.start_of(model, optimizer, devices, key=jax.random.key(0))
    with jax.set_mesh(devices.mesh):
        return folder, files, devices, model, start.make().params


def _options(folder, changes):
    config = importlib.import_module("configs.rlvr").get_config("tiny,new")
    own = {f"model.sizes.{name}": value for name, value in rl_run.SMALL.items()} | {
        "mesh.num_devices": 1,
        "model.folder": str(folder / "tok"),
        "prompts.path": (str(folder / "corpus" / "rl" / "train.parquet"),),
        "rollout.num_prompts": _NUM_PROMPTS,
        "rollout.num_responses": _NUM_RESPONSES,
        "rollout.max_response_tokens": 24,
    }
    with config.ignore_type():
        config.update_from_flattened_dict(own | changes)
    return configuration.parse(rlvr_config.Config, config)


@pytest.mark.parametrize("stage", ["align", "rlvr"])
@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.9}])
def test_a_cut_of_the_vocabulary_is_refused_unless_it_is_allowed(stage, cut):
    section = importlib.import_module(f"configs.{stage}").get_config("tiny").rollout
    section.update({"top_p": 1.0})
    assert configuration.parse(rollouts.Rollout, section).top_p == 1.0
    section.update(cut)
    with pytest.raises(errors.InputError, match="of another distribution; is_cut_allowed=True"):
        configuration.parse(rollouts.Rollout, section)
    section.is_cut_allowed = True
    found = configuration.parse(rollouts.Rollout, section)
    assert {name: getattr(found, name) for name in cut} == cut


def _draw(opened, changes) -> tuple[engine.Rollout, list[int]]:
    """Return the responses, and how many programs each part of decoding was compiled to."""
    folder, files, devices, model, params = opened
    options = _options(folder, changes)
    words, asked = rlvr_feed.open_prompts(options, files, folder=None)
    sampler = rlvr_main.open_sampler(options, model, devices, words, asked)
    prompts = encode.encode_prompts([asked.rows[n] for n in range(_NUM_PROMPTS)], words)
    before = prefill.fill._cache_size(), decode.num_programs()
    with jax.set_mesh(devices.mesh):
        drawn = sampler(params, prompts, jax.random.key(3))
    assert drawn.num_prompts == _NUM_PROMPTS
    assert len(drawn.segments) == _NUM_PROMPTS * _NUM_RESPONSES
    after = prefill.fill._cache_size(), decode.num_programs()
    return drawn.rollout, [new - old for new, old in zip(after, before, strict=True)]


def test_few_slots_give_what_many_give_and_compile_one_program(opened):
    whole, _ = _draw(opened, {})
    few, compiled = _draw(opened, {"rollout.batch_responses": 3})
    # Prompts are read two at a time or alone, with images or without.
    assert compiled[1] == 1
    assert compiled[0] <= 4
    for name in ("tokens", "lengths", "ended"):
        np.testing.assert_array_equal(getattr(few, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(few.logprobs, whole.logprobs, atol=1e-5)
    assert len({row.tobytes() for row in whole.tokens}) == _NUM_PROMPTS * _NUM_RESPONSES


def test_copies_of_the_weights_that_do_not_divide_are_refused(opened):
    with pytest.raises(errors.InputError, match="tensor must be >= 1"):
        _options(opened[0], {"rollout.tensor": 0})
    with pytest.raises(errors.InputError, match=r"divide 2 kv heads and 1 devices, got 2"):
        _draw(opened, {"rollout.tensor": 2})
