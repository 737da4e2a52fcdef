"""A discriminator through warm-up, alignment, warm-up again and export, by the released choices."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from configs import align
from prism_jax import configuration, main, tree_paths
from prism_jax.checkpoints import model_files
from prism_jax.running import metric_writers
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.align import config as align_config
from prism_jax.stages.warmup import start as warmup_start
from prism_jax.training import train_step
from tests import hf_checkpoints
from tests.stages import rl_run, sft_run
from tests.stages.align import align_run

# Right answers, wrong ones, a response that only the released gate accepts, and a cut one.
_TEXTS = (
    *align_run.TEXTS[:3],
    "<caption></caption><think>so</think><answer>2</answer>",
    align_run.TEXTS[3],
)


def _arguments(stage, root, workdir, option, overrides):
    """Return the arguments of a run whose configuration has the option."""
    found = rl_run.arguments(stage, root, workdir, "--config.honesty.every_steps=None", *overrides)
    return [x.replace(":tiny,new", f":tiny,new,{option}") for x in found]


def _from(section, folder):
    """Return the overrides that read a model from a folder in place of making a new one."""
    sizes = f"--config.{section}.sizes."
    chosen = [f"--config.{section}.{x}" for x in ("init=pretrained", "sizes=None")]
    return sizes, [*chosen, f"--config.{section}.folder={folder}"]


def _run(arguments, *models):
    """Run a stage with models from folders."""
    for section, folder in models:
        sizes, chosen = _from(section, folder)
        arguments = [x for x in arguments if not x.startswith(sizes)] + chosen
    return rl_run.run_arguments(arguments)


def _warm_up(root, model, workdir, *overrides, option="official,both"):
    shared = ("--config.train.num_steps=1", "--config.evaluate.every_steps=1", *overrides)
    arguments = _arguments("warmup", root, workdir, option, shared)
    return _run(arguments, *([] if model is None else [("model", model)]))


def _align(root, models, workdir, *overrides, option="official,rlvr_v2,both"):
    shared = (
        "--config.train.num_steps=4",
        "--config.rollout.num_responses=4",
        "--config.rollout.max_response_tokens=96",
        "--config.pace.discriminator_updates=2",
        "--config.pace.discriminator_warmup_steps=1",
        *overrides,
    )
    with align_run.scripted(root / "tok", _TEXTS):
        return _run(_arguments("align", root, workdir, option, shared), *models.items())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Warm a discriminator up and align a new policy with it, both as released."""
    root = tmp_path_factory.mktemp("chain")
    with rl_run.compiled_once(tmp_path_factory.mktemp("compiled")):
        rl_run.write(root)
        held_out = "--config.data.held_out_fraction=0.3"
        assert _warm_up(root, None, root / "warmed", held_out) == 0
        made = []
        make = train_step.make_train_step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                train_step,
                "make_train_step",
                lambda *a, **k: made.append(make(*a, **k)) or made[-1],
            )
            assert _align(root, {"discriminator": root / "warmed"}, root / "aligned") == 0
        assert [step._cache_size() for step in made] == [1, 1]
        yield root


def test_the_released_run_works_and_the_policy_stands_still_at_first(root):
    rows = rl_run.rows(root / "aligned")
    assert ["policy/entropy" in row for row in rows] == [False, True, True, True]
    for row in rows:
        assert row["optim/policy_skipped_in_row"] == row["optim/discriminator_skipped_in_row"] == 0
        assert "reward/accuracy_mean" in row
    (line,) = (
        json.loads(x) for x in (root / "aligned/rollouts/00000002.jsonl").open().readlines()[:1]
    )
    assert {"accuracy", "advantage", "caption_score", "teacher_cot_score"} <= set(line)
    before = sft_run.saved(root / "warmed")
    after = sft_run.saved(root / "aligned", "discriminator.params")
    moved = [name for name, value in before.items() if np.abs(after[name] - value).max() > 0]
    assert {"score/kernel", "trunk/text/embed/embedding"} <= set(moved), moved


def test_all_three_segments_are_in_warm_up_its_evaluation_and_alignment(root):
    for stage, areas in (("warmed", ("eval", "discriminator")), ("aligned", ("discriminator",))):
        row = rl_run.rows(root / stage)[-1]
        for area in areas:
            ends = [name.split("/")[1] for name in row if name.startswith(f"{area}/")]
            found = [name.removesuffix("_gap") for name in ends if name.endswith("_gap")]
            assert sorted(found) == ["caption", "cot", "response"]


def test_a_stopped_run_with_dropout_and_several_updates_goes_on_bit_for_bit(root, tmp_path):
    write = metric_writers.JsonLines.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric_writers.JsonLines, "write", write_and_stop)
        assert _align(root, {"discriminator": root / "warmed"}, tmp_path) == 143
    assert _align(root, {"discriminator": root / "warmed"}, tmp_path) == 0
    assert sft_run.checksums(tmp_path) == sft_run.checksums(root / "aligned")
    assert rl_run.rows(tmp_path) == rl_run.rows(root / "aligned")


def _opened(root, folder, workdir):
    """Return the parameters with which an alignment and a warm-up from a folder begin."""
    config = align.get_config("tiny,new")
    config.mesh.num_devices = 1
    config.model.folder, config.prompts.path = str(root / "tok"), ("prompts.parquet",)
    config.discriminator.folder, config.discriminator.init = str(folder), "pretrained"
    config.discriminator.sizes = None
    options = configuration.parse(align_config.Config, config)
    devices = devices_lib.open_devices(options.mesh, options.model)
    source = options.discriminator.model(options.model)
    files = setup_models.keep_files(
        source, workdir, name=model_files.DISCRIMINATOR_FOLDER, is_discriminator=True
    )
    model = setup_models.open_model(source, devices, files=files, is_discriminator=True)
    optimizer = setup_models.make_optimizer(options.optim, model.params, num_steps=1)
    key = jax.random.key(0)
    starts = (
        setup_models.start_of(model, optimizer, devices, key=key),
        warmup_start.start_of(model, optimizer, devices, key=key),
    )
    return [tree_paths.named_leaves(start.make().params) for start in starts]


def test_warm_up_and_alignment_go_on_from_an_alignment_and_from_its_export(root, tmp_path):
    out = tmp_path / "hf"
    arguments = ["export", f"--workdir={root / 'aligned'}", f"--to={out}", "--dtype=as_is"]
    assert main.main([*arguments, "--item=discriminator"]) == 0
    expected = sft_run.saved(root / "aligned", "discriminator.params")
    head = hf_checkpoints.read(out)["v_head.1.weight"]
    np.testing.assert_array_equal(head, expected["score/kernel"].T)
    for number, folder in enumerate((root / "aligned", out)):
        for found in _opened(root, folder, tmp_path / str(number)):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_warm_up_from_an_alignment_keeps_the_files_of_its_discriminator(root, tmp_path):
    assert _warm_up(root, root / "aligned", tmp_path / "run") == 0
    kept = (tmp_path / "run" / "model" / "config.json").read_bytes()
    assert kept == (root / "aligned" / "discriminator" / "config.json").read_bytes()
