"""No dead field in RLVR beside its algorithms, whose fields test_algorithms.py changes."""

import pytest

from configs import rlvr as config_file
from prism_jax.policy import distill
from prism_jax.policy import loss as policy_loss
from prism_jax.policy import update as policy_update
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.rlvr import adversary_config
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import feed as rlvr_feed
from prism_jax.stages.rlvr import main as rlvr_main
from prism_jax.stages.rlvr import updates as rlvr_updates
from tests import make_tokenizer
from tests.stages import field_tables, prompt_fields, rl_run, rl_toy


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fields")
    make_tokenizer.write(folder / "tok", min_pixels=32 * 32, max_pixels=128 * 128)
    prompt_fields.write(folder)
    return field_tables.Seen(rlvr_config.Config, _configure, folder, refusing=_REFUSING)


def _configure(folder):
    config = config_file.get_config("tiny,new")
    config.update_from_flattened_dict(field_tables.at("model.sizes.", rl_run.SMALL))
    config.model.folder = str(folder / "tok")
    config.prompts.path = (str(folder / "rows.jsonl"),)
    config.mesh.num_devices = 1
    config.rows.row_tokens = 512
    return config


def _devices(given):
    return devices_lib.open_devices(given.options.mesh, given.options.model)


def _open(given):
    """Return devices, model, processor and prompts of a run."""
    devices = _devices(given)
    files = setup_models.keep_files(given.options.model, given.workdir)
    model = setup_models.open_model(
        given.options.model, devices, files=files, is_discriminator=False
    )
    return devices, model, *rlvr_feed.open_prompts(given.options, files, folder=given.workdir)


def _feed(given):
    _, _, words, opened = _open(given)
    return rlvr_feed.open_feed(given.options, words, opened, None, None)


def read(given):
    """Return the prompts of the first steps, as the policy reads them."""
    feed = _feed(given)
    asked = [next(feed) for _ in range(given.options.train.num_steps)]
    return [(one.indices, [(x.tokens, x.pixels) for x in one.prompts]) for one in asked]


def from_store(given):
    """Return the same of prompts that lie in an object store."""
    with field_tables.a_store(given.folder):
        return read(given)


def rows(given):
    """Return the shape of the rows into which prompts and responses are laid."""
    devices, _, _, opened = _open(given)
    return rlvr_updates.shape_of(given.options, opened.sizes, devices)


def drawn_with(given):
    """Return what the engine is asked."""
    devices, model, words, opened = _open(given)
    sampler = rlvr_main.open_sampler(given.options, model, devices, words, opened)
    return field_tables.asked_of_the_engine(sampler, given.options.rollout.num_prompts)


def judged(given):
    """Return the rewards of four responses, and the processes that are started."""
    return field_tables.judged(given.options.rewards.open_judge, prompt_fields.TASKS)


def settings(given):
    """Return how the policy's loss is computed."""
    options = given.options
    return policy_update.settings(options.train, options.rollout, options.model, _devices(given))


def threads(given):
    """Return how many threads make prompts ahead."""
    return field_tables.threads_ahead(lambda: _feed(given))


def asked_of_the_loop(given):
    return field_tables.asked_of_the_loop(rlvr_main.main, given)


def optimizer(given):
    return field_tables.moved(given.options.optim)


def devices(given):
    return field_tables.placed(_devices(given))


def model(given):
    return field_tables.shapes(_open(given)[1])


_TABLE = {
    read: prompt_fields.read(is_mixture=True)
    | field_tables.each({"seed": 1, "rollout.num_prompts": 3}),
    from_store: prompt_fields.stored(is_mixture=True),
    rows: field_tables.each(
        {
            **{"rows.row_tokens": 1024, "rows.row_sequences": 1, "rows.num_rows": 4},
            "rows.has_shared_prompts": True,
        }
    ),
    drawn_with: field_tables.each(
        {
            "rollout.num_responses": 4,
            "rollout.max_response_tokens": 64,
            "rollout.temperature": 0.5,
            "rollout.chunk_tokens": 8,
            "rollout.batch_responses": 2,
        }
    )
    | field_tables.cuts()
    | field_tables.ROLLOUT_MESH,
    judged: field_tables.each(
        {
            "rewards.judge": "official",
            "rewards.custom": "@reward.py:score",
            "rewards.accuracy_weight": 0.5,
            "rewards.format_weight": 0.5,
        }
    )
    | prompt_fields.judge("rewards."),
    settings: field_tables.each(
        {
            "model.remat": "full",
            "model.attention": "splash",
            "train.head_chunk_tokens": 16,
            "train.has_entropy": False,
        }
    ),
    threads: field_tables.each({"train.num_threads": 3}),
    asked_of_the_loop: field_tables.OF_THE_LOOP,
    optimizer: field_tables.optim("optim."),
    devices: field_tables.mesh() | field_tables.model_types(),
    model: field_tables.sizes("model.sizes.") | field_tables.lora(),
}
_REFUSING = {*prompt_fields.REFUSING, "model.attention"}
_SECTIONS = {
    "advantage": rlvr_config.Advantage,
    "algorithm": policy_loss.Algorithm,
    "groups": rlvr_config.Groups,
    "overlong": rlvr_config.Overlong,
    "reference": rlvr_config.Reference,
}
_ELSEWHERE = {
    "tests/stages/rlvr/test_algorithms.py, which has all fields of these sections": (
        *(f for name, kind in _SECTIONS.items() for f in field_tables.fields(kind, f"{name}.")),
        *("train.num_minibatches", "train.num_epochs"),
    ),
    "tests/stages/rlvr/test_rlvr.py: every how many steps a dump is written": (
        "rollout.dump_every_steps",
    ),
    "tests/stages/sft/test_sft.py, test_rlvr.py: where a model comes from": (
        *("model.folder", "model.init", "model.step"),
    ),
    "tests/policy/test_rollouts.py": ("rollout.is_cut_allowed",),
    "tests/policy/test_held_out.py": field_tables.HELD_OUT,
    "tests/stages/rlvr/test_adversary.py, and alignment's of the same section": tuple(
        field_tables.fields(adversary_config.Adversary, "adversary.")
    ),
    "tests/stages/rlvr/test_distill.py": tuple(field_tables.fields(distill.Distill, "distill.")),
    "one process alone": ("mesh.is_distributed",),
    "tests/stages/test_rl_configs.py": ("mesh.axes.sequence",),
}


def test_every_field_is_in_the_table_or_named_with_the_test_that_sees_it():
    found, named = field_tables.seen(_TABLE), field_tables.named(_ELSEWHERE)
    assert not found & named
    assert field_tables.fields(rlvr_config.Config) - named == found


@pytest.mark.parametrize("probe", _TABLE)
def test_a_probe_sees_the_same_twice(seen, probe):
    assert seen.look(probe, {}) == seen.base(probe, {})


@pytest.mark.parametrize(("probe", "before", "after"), field_tables.cases(_TABLE))
def test_every_field_changes_what_is_seen(seen, probe, before, after):
    seen.assert_change_shows(probe, before, after)


@pytest.mark.parametrize("name", ["temperature", "max_response_tokens"])
def test_what_is_drawn_with_is_what_the_loss_reckons_with(seen, name):
    value = {"temperature": 0.5, "max_response_tokens": 64}[name]
    seen.assert_change_shows(settings, {}, {f"rollout.{name}": value})


def test_the_entropy_is_told_where_it_is_measured():
    told = [
        rl_toy.Run(rl_toy.options_of("", {"train.has_entropy": is_asked})).take(1).rows[0]
        for is_asked in (True, False)
    ]
    assert set(told[0]) - set(told[1]) == {"policy/entropy"}
