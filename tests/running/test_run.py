"""The folder of a run: each kind of job refuses that of another kind, and nothing in it changes."""

import pathlib

import pytest

from configs import curate as curate_file
from configs import evaluate as evaluate_file
from configs import pairs as pairs_file
from prism_jax import errors
from prism_jax.commands import evaluate, pairs
from prism_jax.commands.curate import main as curate_main
from prism_jax.running import run as run_lib
from tests.stages import sft_run

_TRAINING = ("checkpoints/3/meta", "model/config.json", "finished.json", "metrics.jsonl")
_ANSWERS = ("run.json", "summary.json", "responses.jsonl", "dropped_prompts.jsonl")
_CURATED = ("difficulty/run.json", "teacher/cache/ab/entry.json")


def _write(folder: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def _listed(folder: pathlib.Path) -> dict[pathlib.Path, str | None]:
    return {path: path.read_text() if path.is_file() else None for path in folder.rglob("*")}


def _start(stage: str, workdir: pathlib.Path) -> None:
    """Start a stage up to the prompts, which are not there."""
    if stage == "curate":
        config = curate_file.get_config("tiny,difficulty")
        section, run = config.difficulty, curate_main.run
    else:
        file, module = {"evaluate": (evaluate_file, evaluate), "pairs": (pairs_file, pairs)}[stage]
        section = config = file.get_config("tiny")
        run = module.run
    section.policy.folder = section.prompts.path = str(workdir.parent / "nowhere")
    run(config, str(workdir), open_sampler=None)


@pytest.mark.parametrize("stage", ["evaluate", "pairs", "curate"])
@pytest.mark.parametrize("held", [_TRAINING, _TRAINING[:1], _TRAINING[1:2], _TRAINING[2:3]])
def test_a_job_that_asks_refuses_the_folder_of_a_training_run(tmp_path, stage, held):
    workdir = _write(tmp_path / "run", *held)
    before = _listed(workdir)
    with pytest.raises(errors.InputError) as error:
        _start(stage, workdir)
    assert f"{workdir} holds a training run ({held[0].removesuffix('/3/meta')}" in str(error.value)
    assert "a folder is for one kind of job" in str(error.value)
    assert "use another workdir" in str(error.value)
    assert _listed(workdir) == before


@pytest.mark.parametrize(
    ("stage", "held", "what"),
    [
        ("evaluate", _CURATED, "the steps of curate"),
        ("pairs", _CURATED[1:], "the steps of curate"),
        ("curate", _ANSWERS, "an evaluation or pairs"),
    ],
)
def test_evaluate_and_pairs_share_no_folder_with_curate(tmp_path, stage, held, what):
    workdir = _write(tmp_path / "run", *held)
    before = _listed(workdir)
    with pytest.raises(errors.InputError, match=f"holds {what} "):
        _start(stage, workdir)
    assert _listed(workdir) == before


@pytest.mark.parametrize(
    ("held", "what"),
    [(_ANSWERS, "an evaluation or pairs (run.json)"), (_CURATED, "the steps of curate (diff")],
)
def test_a_training_run_refuses_the_folder_of_a_job_that_asks(tmp_path, capsys, held, what):
    folder = sft_run.write(tmp_path / "files", num_rows=1)
    workdir = _write(tmp_path / "run", *held)
    before = _listed(workdir)
    assert sft_run.run(folder, workdir) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {workdir} holds {what}")
    assert last.endswith("and this is a training run: use another workdir")
    assert _listed(workdir) == before


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        # A training run that was killed before its first checkpoint, and one before that.
        ("training", ("checkpoints/leftover", "model/config.json", "tensorboard/events")),
        ("training", ("dropped_prompts.jsonl", "lock.json.partial")),
        ("training", _TRAINING),
        # The folders of a chain, below its own.
        ("training", ("evaluate_sft/run.json", "sft/checkpoints/3/meta")),
        ("answers", ("dropped_prompts.jsonl",)),
        ("answers", (*_ANSWERS, "parts/greedy/00000000.jsonl")),
        ("curate", _CURATED),
        ("curate", ("difficulty/dropped_prompts.jsonl",)),
    ],
)
def test_a_folder_of_the_same_kind_or_with_nothing_of_any_is_used(tmp_path, kind, held):
    workdir = _write(tmp_path / "run", *held)
    before = _listed(workdir)
    with run_lib.hold(str(workdir), kind=kind) as found:
        assert found == workdir
    assert _listed(workdir) == before
