"""No dead field: whatever the configuration of the whole chain can say changes its steps."""

import pytest

from configs import pipeline as config_file
from prism_jax.commands.pipeline import steps as pipeline_steps
from tests.stages import field_tables


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fields")
    return field_tables.Seen(pipeline_steps.Config, _configure, folder, refusing=())


def _configure(folder):
    del folder
    config = config_file.get_config("demo")
    config.base.folder = "BASE"
    return config


def steps(given):
    """Return the commands of the chain."""
    return pipeline_steps.plan(given.options)


_NEW_BASE = {"base.folder": "", "base.tokenizer": "TOKENIZER"}
_WITH_HELD_OUT = {
    f"arguments.{name}": ("--config.held_out.path=FILE",) for name in ("align", "rlvr")
}
_STAGES = ("sft", "upcycle", "pairs", "warmup", "align", "rlvr", "evaluate")
_TABLE = {
    steps: field_tables.each(
        {
            "seed": 1,
            "size": "small",
            "base.folder": "another",
            "trunk": "sft",
            "corpus.level": "small",
            "corpus.rows": ("align=8",),
            "corpus.slips": ("habit=0.5",),
            "title": "A title",
            **{f"arguments.{name}": ("--more",) for name in _STAGES},
        }
    )
    | field_tables.each({"step": "best"}, before=_WITH_HELD_OUT)
    | field_tables.each({"base.tokenizer": "another"}, before=_NEW_BASE)
    | field_tables.each({"arguments.base": ("--more",)}, before=_NEW_BASE),
}


def test_every_field_is_in_the_table():
    assert field_tables.fields(pipeline_steps.Config) == field_tables.seen(_TABLE)


def test_the_same_configuration_has_the_same_steps(seen):
    assert seen.look(steps, {}) == seen.base(steps, {})


@pytest.mark.parametrize(("probe", "before", "after"), field_tables.cases(_TABLE))
def test_every_field_changes_what_is_seen(seen, probe, before, after):
    seen.assert_change_shows(probe, before, after)
