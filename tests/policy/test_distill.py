"""The folder of an open teacher: of any kind, of the policy's words, and no discriminator."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from prism_jax import configuration, errors, main
from prism_jax.data import processor
from prism_jax.policy import distill
from prism_jax.setup import models as setup_models
from tests import tiny_checkpoint, training_run
from tests.stages import rl_toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with policies of each form, of other words, and discriminators."""
    root = tmp_path_factory.mktemp("teachers")
    tiny_checkpoint.write(root / "hf")
    tiny_checkpoint.write(root / "other_words", num_merges=32)
    tiny_checkpoint.write(root / "judge", num_experts=4, score=True)
    convert = ["convert", f"--from={root / 'hf'}", f"--to={root / 'converted'}"]
    assert main.main([*convert, "--direction=hf_to_flax"]) == 0
    for name, is_finished in (("run", True), ("killed", False)):
        training_run.write(
            root / name, models={"": root / "hf"}, steps=(1, 2), finished=is_finished
        )
    return root


@functools.cache
def _policy(folder):
    source = configuration.Model(
        folder=str(folder / "hf"),
        init="pretrained",
        sizes=None,
        remat="none",
        dtype="float32",
        param_dtype="float32",
        attention="xla",
        # Adapters of the policy are none of the teacher's.
        lora=configuration.Lora(rank=2, alpha=1.0, targets=(".*text/layers/attn/q",)),
        step=None,
    )
    model = setup_models.open_model(
        source, rl_toy.devices(), files=folder / "hf", is_discriminator=False
    )
    return model, processor.Processor.from_folder(folder / "hf")


def _options(folder, kind="reverse"):
    return distill.Distill(
        folder=None if folder is None else str(folder),
        kind=kind,
        teacher_share=None,
        coefficient=None if folder is None else 1.0,
        end_coefficient=None,
        decay_steps=None,
        has_reward=True,
    )


def _open(folder, name, *, kind="reverse", extra_places=0):
    model, words = _policy(folder)
    text = model.config.text
    text = dataclasses.replace(text, vocab_size=text.vocab_size + extra_places)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, text=text))
    return distill.open_teacher(_options(folder / name, kind), model, rl_toy.devices(), words)


def test_a_folder_of_each_form_gives_its_parameters_on_the_devices(folder):
    start, fingerprints = training_run.params_of(folder / "hf"), {}
    for name, step in (("hf", 0), ("converted", 0), ("run", 2)):
        teacher = _open(folder, name)
        expected = training_run.moved(start, step)
        jax.tree.map(np.testing.assert_array_equal, teacher.params, expected)
        mesh = rl_toy.devices().mesh
        assert {x.sharding.mesh for x in jax.tree.leaves(teacher.params)} == {mesh}
        fingerprints[name] = teacher.fingerprint
    # They are the parameters', wherever those lie.
    assert fingerprints["hf"] == fingerprints["converted"] != fingerprints["run"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("other_words", "config.distill.folder: .*other_words has other tokens than the policy"),
        ("judge", "judge holds a discriminator, a policy is needed"),
        ("killed", "killed: this run has not finished"),
        ("nowhere", "nowhere"),
    ],
)
def test_what_cannot_teach_is_refused_in_one_line(folder, name, told):
    with pytest.raises(errors.InputError, match=told) as caught:
        _open(folder, name)
    assert "\n" not in str(caught.value)


def test_distributions_need_as_many_places_and_one_token_does_not(folder):
    with pytest.raises(errors.InputError, match=r"places in its vocabulary, the policy \d+"):
        _open(folder, "hf", extra_places=8)
    assert _open(folder, "hf", extra_places=8, kind="k1") is not None


def test_without_a_folder_nothing_is_loaded():
    options = _options(None)
    assert distill.open_teacher(options, None, None, None) is None
    assert distill.make(options, None) is None
    assert distill.teaching_of(options, None) is None


class _Data:
    """The position of some prompts."""

    def __init__(self):
        self.state = {"next_step": 3}

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def test_a_resumed_run_refuses_another_teacher():
    first, second = (
        distill.Teacher(graphdef=None, params=None, fingerprint=name) for name in ("aa", "bb")
    )
    data = _Data()
    assert distill.with_teacher(data, None) is data
    saved = distill.with_teacher(_Data(), first).get_state()
    assert saved == {"next_step": 3, "teacher": "aa"}
    distill.with_teacher(data, first).set_state(saved | {"next_step": 5})
    assert data.state == {"next_step": 5}
    for state in (saved, {"next_step": 3}):
        with pytest.raises(errors.InputError, match=r"cannot resume: the teacher was .* is bb now"):
            distill.with_teacher(data, second).set_state(state)
