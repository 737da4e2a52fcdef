"""The pages for users: their commands, on tiny files, in the order of the page.

Commands of `prism_jax` are run at the tiny size, and stages take one step. Lines of pip, venv and
export are checked, not run; downloads are copies of local folders (`tests/pages.py`).
"""

import json
import re
import shutil

import pytest

from prism_jax import main
from prism_jax.data.numerals import corpus as numerals_corpus
from prism_jax.data.numerals import examples as numerals_examples
from tests import data_files, pages, tiny_checkpoint
from tests.stages import rl_run

_USERS = ("finetune_your_data.md", "your_own_reward.md", "paper_recipe.md")
_ONE_STEP = ("--config.train.num_steps=1", "--config.train.num_epochs=None")
_NO_PANEL = "--config.honesty.every_steps=None"  # another program, of which other tests are
_TINY = {
    "sft": (*_ONE_STEP, "--config.data.row_tokens=512", "--config.data.row_patches=(64,)"),
    "warmup": (*_ONE_STEP, "--config.evaluate.every_steps=None", _NO_PANEL),
    "align": ("--config.train.num_steps=1", "--config.rows.row_tokens=512", _NO_PANEL),
    "rlvr": ("--config.train.num_steps=1", "--config.rows.row_tokens=512"),
    "generate": ("--max_new_tokens=8",),
}


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """Return what stands for the repositories of the hub, while compiled programs are shared."""
    folder = tmp_path_factory.mktemp("hub")
    base = tiny_checkpoint.write(
        folder / "base", texts=numerals_corpus.sample_texts("tiny", 0, 200), num_merges=600
    )
    (folder / "made").mkdir()
    made = rl_run.write(folder / "made")
    rows = dict.fromkeys(numerals_examples.STREAMS, 0)
    rows |= {"public": 4, "teacher": 2, "align": 4, "rl_train": 4, "rl_test": 2}
    corpus = folder / "corpus"
    numerals_corpus.write(
        corpus,
        level="tiny",
        seed=1,
        rows=numerals_corpus.rows_of("tiny", rows),
        slips=numerals_corpus.slips_of("tiny", {}),
        num_processes=1,
    )
    info = json.loads((corpus / "sft" / "dataset_info.json").read_text())
    info |= {"mmr1": info["numerals_public"], "gemini": info["numerals_teacher"]}
    (corpus / "sft" / "dataset_info.json").write_text(json.dumps(info))
    (folder / "rl").mkdir()
    for name, part in (("5.9k", "align/train"), ("filtered_2k", "rl/train")):
        target = folder / "rl" / f"rl_training_data_{name}.parquet"
        shutil.copy(corpus / f"{part}.parquet", target)
    with rl_run.compiled_once(folder / "compiled"):
        yield {
            "Qwen/Qwen3-VL-4B-Instruct": base,
            "Qwen/Qwen3-VL-2B-Instruct": base,
            "prism-vlm/gemini_public_mmr1": corpus / "sft",
            "prism-vlm/gemini_distill": corpus / "sft",
            "prism-vlm/qwen3_vl_moe_warmup_pairwise_120k": made / "pairs",
            "prism-vlm/rl_dataset": folder / "rl",
            "test": corpus / "rl" / "test.parquet",
        }


@pytest.fixture
def run(downloads, tmp_path, monkeypatch):
    """Return a function that runs a page in an empty folder, and gives what it has written."""
    monkeypatch.chdir(tmp_path)

    def run_page(name):
        page = pages.read(name)
        pages.write(page, tmp_path)
        for command in page.commands:
            if command[3:4] != ("plan",):
                pages.run(command, downloads=downloads, tiny=_TINY)
        return tmp_path

    return run_page


def test_finetune_your_data(run, tmp_path, capsys):
    data_files.write_images(tmp_path / "mine" / "pictures", 4)
    folder = run("finetune_your_data.md")
    audit = json.loads((folder / "audit.json").read_text())
    assert audit["rows"] == 2
    # The second has two pictures, the first of them that of the first row.
    assert audit["rows_by_pictures"] == {"1": 1, "2": 1}
    assert audit["pictures"]["distinct"] == 2
    assert audit["responses"]["strict_format"]["mean"] == 1
    assert audit["lengths"]["row_tokens"]["greatest"] > 50
    assert json.loads((folder / "runs/mine_test/summary.json").read_text())["greedy"]
    assert list((folder / "exported").glob("*.safetensors"))
    assert (folder / "runs/mine/dropped_train.jsonl").read_text() == ""
    assert (folder / "runs/mine/tensorboard").is_dir()


def test_your_own_reward(run, downloads, tmp_path, capsys, monkeypatch):
    data_files.write_images(tmp_path / "pictures", 4)
    shutil.copytree(downloads["Qwen/Qwen3-VL-4B-Instruct"], tmp_path / "base/Qwen3-VL-4B-Instruct")
    monkeypatch.syspath_prepend(tmp_path)
    folder = run("your_own_reward.md")
    (row,) = rl_run.rows(folder / "runs/near")
    assert row["reward/reason_scored_fraction"] == 1
    assert row["reward/part_total_mean"] == pytest.approx(
        0.9 * row["reward/part_near_mean"] + 0.1 * row["rollout/ended_fraction"]
    )
    summary = json.loads((folder / "runs/near_test/summary.json").read_text())
    assert summary["greedy"]["reasons"] == {"scored": 2, "timeout": 0, "error": 0}
    assert summary["greedy"]["parts"].keys() == {"total", "accuracy", "near"}
    assert summary["judge"] == "reward.py:score"
    # The same run with another function is refused, before anything is compiled.
    (folder / "reward.py").write_text("def score(sample):\n    return 1\n")
    command = next(c for c in pages.read("your_own_reward.md").commands if c[3:4] == ("rlvr",))
    capsys.readouterr()
    with pytest.raises(AssertionError, match="exit code 2"):
        pages.run((*command, "--config.train.num_steps=2"), downloads=downloads, tiny={
            "rlvr": ("--config.rows.row_tokens=512",)})  # fmt: skip
    assert "config.files.rewards.custom" in capsys.readouterr().err


def test_paper_recipe(run, downloads, tmp_path):
    """Every stage takes a step, from the state that the stage before it has saved."""
    shutil.copy(downloads["test"], tmp_path / "test.parquet")
    folder = run("paper_recipe.md")
    for stage in ("sft", "warmup", "align", "rlvr"):
        (row,) = rl_run.rows(folder / "runs" / stage)
        numbers = [value for value in row.values() if isinstance(value, int | float)]
        assert row["step"] == 1 and numbers, stage
        assert (folder / "runs" / stage / "finished.json").exists()
    assert (folder / "exported/config.json").exists()
    assert json.loads((folder / "runs/test/summary.json").read_text())
    assert (folder / "runs/pairs/summary.json").exists()


def test_the_plans_of_the_recipe_are_printed(monkeypatch, capsys):
    monkeypatch.chdir(pages.ROOT)
    commands = [c for c in pages.read("paper_recipe.md").commands if c[3:4] == ("plan",)]
    assert commands
    for command in commands:
        pages.run(command, downloads={}, tiny={})


def test_the_page_of_plan_shows_what_is_printed(monkeypatch, capsys):
    monkeypatch.chdir(pages.ROOT)
    shown = pages.shown("plan.md")
    assert len(shown) == 2
    for command, output in shown:
        assert command[:4] == ("python", "-m", "prism_jax", "plan")
        code = main.main([*command[3:]])
        assert capsys.readouterr().out == output
        assert code == ("it fits with" in output)


@pytest.mark.parametrize("name", [*_USERS, "index.md", "plan.md"])
def test_links_lead_somewhere(name):
    assert pages.links(name) == []


def test_every_page_is_in_the_index():
    text = (pages.ROOT / "docs" / "index.md").read_text()
    names = {path.name for path in (pages.ROOT / "docs").glob("*.md")} - {"index.md"}
    assert names <= set(re.findall(r"\]\(([\w.]+\.md)", text))
