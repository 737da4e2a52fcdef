"""Held-out prompts in RLVR: judged every few steps, the best step kept, the run stopped.

Alignment's are in tests/stages/align/test_options.py.
"""

import json

import pytest

from configs import align as align_file
from configs import rlvr as rlvr_file
from prism_jax import configuration, errors
from prism_jax.policy import held_out
from prism_jax.stages.align import config as align_config
from prism_jax.stages.rlvr import config as rlvr_config
from tests.stages import rl_run
from tests.stages.align import align_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with rl_run.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield rl_run.write(tmp_path_factory.mktemp("held_out"))


def _run(folder, workdir, *overrides):
    path = folder / "corpus" / "align" / "train.parquet"
    usual = (
        f"--config.held_out.path={path}",
        "--config.held_out.every_steps=1",
        "--config.held_out.num_prompts=3",
        "--config.train.num_steps=4",
        "--config.rollout.max_response_tokens=96",
        "--config.rollout.dump_every_steps=None",
        "--config.checkpoint.save_every_steps=4",
        "--config.checkpoint.num_kept=1",
    )
    with align_run.scripted(folder / "tok"):
        return rl_run.run("rlvr", folder, workdir, *usual, *overrides)


def test_held_out_prompts_are_judged_and_the_best_step_is_named_and_kept(
    folder, tmp_path, monkeypatch, capsys
):
    asked, values = [], iter([0.25, 0.75, 0.5, 0.5])
    measure = held_out.Evaluation.__call__

    def scripted(self, params):
        found = measure(self, params)
        asked.append(found)
        return found | {held_out.METRIC: next(values)}

    monkeypatch.setattr(held_out.Evaluation, "__call__", scripted)
    assert _run(folder, tmp_path, "--config.held_out.patience=2") == 0
    # The script's answers are right or wrong by chance; the evaluation's own samples are the same
    # in each evaluation.
    assert len({(x[held_out.METRIC], x["eval/format_fraction"]) for x in asked}) == 1
    assert all(x["eval/num_prompts"] == 3 for x in asked)
    named = json.loads((tmp_path / "best.json").read_text())
    assert (named["step"], named["value"], len(named["evaluations"])) == (2, 0.75, 4)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*"))
    assert kept == [2, 4]
    summary = json.loads((tmp_path / "finished.json").read_text())["summary"]
    assert summary["best_step"] == 2 and summary["is_stopped_early"]
    shown = capsys.readouterr().err
    assert "eval/accuracy 0.75  eval/best_step 2" in shown
    assert "has not risen for 2 evaluations: the run ends after step 4" in shown


def _parse(stage, changes):
    module, kind = {
        "align": (align_file, align_config.Config),
        "rlvr": (rlvr_file, rlvr_config.Config),
    }[stage]
    config = module.get_config("tiny")
    config.model.folder, config.prompts.path = "x", ("trained",)
    if stage == "align":
        config.discriminator.folder = "x"
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return configuration.parse(kind, config)


@pytest.mark.parametrize("stage", ["align", "rlvr"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"held_out.every_steps": 2}, "held_out.every_steps must be given exactly with path"),
        ({"held_out.path": ("other",)}, "held_out.every_steps must be given exactly with path"),
        (
            {"held_out.path": ("trained",), "held_out.every_steps": 2},
            "held_out.path must not be trained on, got trained",
        ),
        ({"held_out.num_responses": 2}, "num_responses must be 1 with temperature = 0"),
        ({"held_out.patience": 0}, "held_out.patience must be >= 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(stage, changes, told):
    with pytest.raises(errors.InputError, match=told):
        _parse(stage, changes)
