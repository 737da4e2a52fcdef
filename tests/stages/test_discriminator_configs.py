"""Options of alignment's and warm-up's configurations: what each sets, and what is refused."""

import dataclasses

import pytest

from configs import align, warmup
from prism_jax import configuration, errors
from prism_jax.stages.align import config as align_config
from prism_jax.stages.warmup import config as warmup_config


def _align(arg, changes=()):
    config = align.get_config(arg)
    config.model.folder = config.discriminator.folder = "model"
    config.prompts.path = ("prompts.parquet",)
    config.update_from_flattened_dict(dict(changes))
    return configuration.parse(align_config.Config, config)


def _warmup(arg, changes=()):
    config = warmup.get_config(arg)
    config.model.folder, config.data.train = "model", ("pairs.jsonl",)
    config.update_from_flattened_dict(dict(changes))
    return configuration.parse(warmup_config.Config, config)


def _flat(section, prefix=""):
    found = {}
    for field in dataclasses.fields(section):
        value = section.__getattribute__(field.name)
        name = prefix + field.name
        found |= _flat(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def _difference(one, other):
    one, other = _flat(one), _flat(other)
    return {name: other[name] for name in one if one[name] != other[name]}


_OFFICIAL = {
    "discriminator.teacher_max_tokens": 512,
    "discriminator.scored_token": "pad",
    "discriminator.positions": "text_1d",
    "discriminator.max_pixels": None,
    "discriminator.score_dtype": "bfloat16",
    "discriminator.head_dropout": 0.1,
    "discriminator.microbatch_pairs": 2,
    "discriminator.all_invalid": "released",
    "discriminator.optim.no_decay": (),
    "gate": "official",
    "judge.rule": "official",
    "algorithm.aggregation": "official",
    "optim.no_decay": (),
}


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_official_is_the_base_configuration_and_the_released_choices(size):
    assert _difference(_align(size), _align(f"{size},official")) == _OFFICIAL
    assert _difference(_warmup(size), _warmup(f"{size},official")) == {
        "data.scored_token": "newline",
        "data.held_out_fraction": 0.0,
        "data.gate": "official",
        "pairs.score_dtype": "bfloat16",
        "pairs.router": 0.0,
        "pairs.head_dropout": 0.1,
        "optim.no_decay": (),
    }


@pytest.mark.parametrize(
    ("mode", "own"),
    [
        ("acc_gating", {"advantage.format_of": "judge"}),
        ("gated_align", {"advantage.accuracy": "nobody"}),
        ("rlvr", {"advantage.format_of": "judge"}),
        ("rlvr_v2", {"advantage.format_of": "judge"}),
        ("sign_align", {"advantage.format_of": "judge"}),
    ],
)
def test_each_mode_is_whole_and_its_official_form_has_the_released_format_or_no_accuracy(mode, own):
    options = _align(f"4b,{mode}")
    assert options.advantage.mode == mode
    assert options.advantage.asks_judge
    official = _align(f"4b,{mode},official")
    assert _difference(options, official) == _OFFICIAL | own


def test_views_name_their_segments_and_weigh_them():
    assert _align("4b,whole").advantage.weights == {"response": 1.0}
    both = _align("4b,both")
    assert both.advantage.weights == {"caption": 0.25, "cot": 0.25, "response": 0.5}
    assert both.discriminator.form.names == ("caption", "cot", "response")
    assert _warmup("4b,whole").data.form.names == ("response",)


def test_a_text_trunk_sees_no_picture_and_decays_what_it_has():
    for one in (_warmup("4b,text_trunk").data, _align("4b,text_trunk").discriminator):
        assert not one.sees_images
    for optim in (_warmup("4b,text_trunk").optim, _align("4b,text_trunk").discriminator.optim):
        assert optim.no_decay == (".*/scale",)
        assert optim.frozen == ()


@pytest.mark.parametrize(
    ("arg", "changes", "told"),
    [
        ("4b", {"discriminator.view": "whole"}, "weight for each of response"),
        ("4b,whole", {"advantage.caption_weight": 0.5}, "weight for each of response"),
        ("4b", {"advantage.mode": "rlvr"}, "align_coef must be given for rlvr"),
        ("4b,rlvr", {"advantage.format_penalty": 1.0}, "format_penalty must be None for rlvr"),
        ("4b,rlvr", {"advantage.accuracy": "off"}, "accuracy must be 'off' for align and"),
        ("4b", {"advantage.format_of": "judge"}, "format_of must be 'gate'"),
        ("4b", {"discriminator.length_beta": (("response", 0.1),)}, "caption, cot at most once"),
        ("4b", {"discriminator.microbatch_pairs": 5}, "must divide the responses of a step, 64"),
        ("4b", {"discriminator.head_dropout": 1.0}, "head_dropout must be in"),
        ("4b", {"pace.policy_every_steps": 0}, "policy_every_steps must be >= 1"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(arg, changes, told):
    with pytest.raises(errors.InputError, match=told):
        _align(arg, changes)


def test_warm_up_refuses_a_length_of_a_segment_that_it_has_not():
    with pytest.raises(errors.InputError, match=r"pairs\.length_beta must name"):
        _warmup("4b", {"pairs.length_beta": (("response", 0.1),)})


@pytest.mark.parametrize("module", [align, warmup])
def test_two_views_or_two_modes_at_once_are_refused(module):
    with pytest.raises(ValueError, match="one of whole, both"):
        module.get_config("4b,whole,both")
    with pytest.raises(ValueError, match=r"one of acc_gating|options are"):
        module.get_config("4b,rlvr,sign_align")


@pytest.mark.parametrize(
    ("warmup_steps", "every", "expected"),
    [(0, 1, [1, 1, 1, 1, 1, 1]), (2, 1, [0, 0, 1, 1, 1, 1]), (1, 3, [0, 1, 0, 0, 1, 0])],
)
def test_the_pace_says_in_which_steps_the_policy_learns(warmup_steps, every, expected):
    pace = align_config.Pace(
        discriminator_updates=1,
        policy_every_steps=every,
        discriminator_warmup_steps=warmup_steps,
        discriminator_max_accuracy=None,
        policy_min_accuracy=None,
    )
    assert [pace.has_policy_update(step) for step in range(6)] == [bool(x) for x in expected]
