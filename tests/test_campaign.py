"""The campaign: its policies, its order, its resumption, its budgets and its arithmetic."""

import importlib
import json
import sys

import pytest

from benchmarks import campaign, campaign_page, campaign_policies, campaign_record
from prism_jax import configuration, errors, main
from prism_jax.data.numerals import corpus as numerals_corpus
from prism_jax.data.numerals import examples as numerals_examples


def _policies(size):
    config = campaign.seed_chain(size, 3, "BASE", ())
    return campaign_policies.Campaign(config).policies()


@pytest.fixture(scope="module", params=["demo", "small"])
def parsed(request, tmp_path_factory):
    """Return each step of a seed with its parsed configuration, by name."""
    folder = tmp_path_factory.mktemp("seed")
    found = {}
    base = campaign.base_steps("small", ()) if request.param == "small" else []
    for step in (*base, *campaign_policies.steps_of(_policies(request.param))):
        command, *arguments = step.command(folder)
        module = importlib.import_module(f"prism_jax.{main.COMMANDS[command][0]}")
        if command in ("data", "upcycle", "export"):
            module.parser().parse_args(arguments)
            continue
        config, _ = configuration.read(arguments, command=command)
        if command in ("sft", "warmup", "align", "rlvr"):
            module = importlib.import_module(f"prism_jax.stages.{command}.config")
        found[step.name] = configuration.parse(module.Config, config)
    return found


def test_every_step_of_every_policy_is_a_command_that_takes_its_arguments(parsed):
    assert len(parsed) > 60
    assert parsed["align_text_only"].discriminator.sees_images is False
    assert parsed["align_whole"].discriminator.view == "whole"
    assert parsed["warmup_dense"].model.folder == "BASE"
    assert parsed["sft_dapo"].groups.keep == "accuracy"
    assert parsed["prism_gspo"].algorithm.loss == "gspo"
    assert parsed["adversary_grpo"].adversary.end_coefficient == 0


def test_budgets_are_equal_but_for_the_control_that_changes_them(parsed):
    rlvr = {name: one for name, one in parsed.items() if hasattr(one, "reference")}
    assert len(rlvr) == 19
    longer = rlvr.pop("sft_grpo_longer")
    plain = rlvr["sft_grpo"]
    for one in rlvr.values():
        assert (one.rollout, one.train, one.optim, one.rows, one.prompts) == (
            *(plain.rollout, plain.train, plain.optim, plain.rows, plain.prompts),
        )
        assert one.generation_prompts == plain.generation_prompts
        assert one.groups.max_generations in (None, 1)
    assert longer.rollout == plain.rollout
    aligned = [one for one in parsed.values() if hasattr(one, "pace")]
    assert len(aligned) == 11
    for one in aligned:
        assert (one.rollout, one.train, one.optim, one.prompts) == (
            *(aligned[0].rollout, aligned[0].train, aligned[0].optim, aligned[0].prompts),
        )
    num_align = aligned[0].train.num_steps * aligned[0].rollout.num_prompts
    num_align *= aligned[0].rollout.num_responses
    step = plain.rollout.num_prompts * plain.rollout.num_responses
    assert longer.train.num_steps == plain.train.num_steps + num_align // step


def test_options_differ_from_the_plain_alignment_in_what_they_name_alone():
    steps = {step.name: step for step in campaign_policies.steps_of(_policies("demo"))}
    plain, other = (set(steps[name].arguments) for name in ("align", "align_segment"))
    assert plain - other == {"--workdir=$WORKDIR/align"}
    assert other - plain == {
        "--workdir=$WORKDIR/align_segment",
        "--config.advantage.credit=segment",
    }
    plain, other = (set(steps[name].arguments) for name in ("rlvr", "sft_gspo"))
    assert {a.partition("=")[0] for a in plain ^ other} == {
        *("--config", "--workdir", "--config.model.folder"),
    }


def test_a_base_model_is_trained_once_for_all_seeds():
    steps = {step.name: step for step in campaign.base_steps("small", ())}
    assert list(steps) == ["tokenizer", "data", "base", "base_model"]
    rows = {a for a in steps["data"].arguments if a.startswith("--rows=")}
    assert {row for row in rows if not row.endswith("=0")} == {"--rows=base=64000"}
    config = campaign.seed_chain("small", 3, "BASE", ())
    assert not any(row.startswith("base=") for row in config.corpus.rows)
    assert config.seed == 3


def test_policies_are_chosen_with_what_they_follow_and_shared_steps_run_once():
    policies = _policies("demo")
    named = campaign_policies.chosen(policies, ["text_only_grpo"])
    assert [p.name for p in named] == ["base", "sft", "prism", "text_only", "text_only_grpo"]
    names = [step.name for step in campaign_policies.steps_of(policies)]
    assert names[:5] == ["data", "evaluate_base", "sft", "evaluate_sft", "sft_grpo"]
    assert len(names) == len(set(names))
    with pytest.raises(ValueError, match="got nothing"):
        campaign_policies.chosen(policies, ["nothing"])


_STAGE = """
import json, os, pathlib, shutil, sys, time
command, values = sys.argv[1], dict(a[2:].split("=", 1) for a in sys.argv[2:] if "=" in a)
folder = pathlib.Path(values.get("workdir") or values.get("out") or values["to"])
root = folder.parent
with (root / "order").open("a") as file:
    file.write(folder.name + " begins\\n")
while folder.name == "warmup" and (root.parent / "slow").exists():
    time.sleep(0.01)
if command == "data":
    shutil.copytree(os.environ["STAGE_CORPUS"], folder)
else:
    folder.mkdir(exist_ok=True)
if command in ("align", "rlvr"):
    steps = [int(a.split("=")[1]) for a in sys.argv if a.startswith("--config.train.num_steps=")]
    row = {"discriminator/caption_gap": 1.0} if command == "align" else {"rollout/generations": 1}
    rows = [json.dumps({"step": n + 1} | row) + "\\n" for n in range((steps or [2])[-1])]
    (folder / "metrics.jsonl").write_text("".join(rows))
if command == "evaluate":
    level = ["base", "sft", "sft_grpo", "align", "rlvr"]
    name = folder.name.removeprefix("evaluate_")
    right = level.index(name) if name in level else 0
    rows = [
        {"id": f"test.parquet:{n + 1}", "draw": "greedy", "accuracy": float(n < right),
         "format_ok": name != "base", "response_tokens": 10, "caption": None}
        for n in range(6)
    ]
    (folder / "responses.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in rows))
with (root / "order").open("a") as file:
    file.write(folder.name + " ends\\n")
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Return the program in place of the stages, which takes their arguments."""
    folder = tmp_path_factory.mktemp("stage")
    (folder / "stage.py").write_text(_STAGE)
    numerals_corpus.write(
        folder / "corpus",
        level="tiny",
        seed=3,
        rows=numerals_corpus.rows_of(
            "tiny", dict.fromkeys(numerals_examples.STREAMS, 0) | {"rl_test": 6}
        ),
        slips=numerals_corpus.slips_of("tiny", {}),
        num_processes=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAGE_CORPUS", str(folder / "corpus"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        for name in campaign.ENVIRONMENT:
            patch.setenv(name, "0")
        yield (sys.executable, "-S", str(folder / "stage.py"))


def test_a_campaign_that_time_ends_goes_on_where_it_was(stage, tmp_path, capsys):
    arguments = [str(tmp_path), "--size=tiny", "--base=BASE", "--policies=core,sft_dapo"]
    (tmp_path / "slow").touch()
    late = campaign.main([*arguments, "--seeds=3,4", "--minutes=0.05"], program=stage)
    assert late == 0
    assert "time is over" in capsys.readouterr().err
    record = json.loads((tmp_path / "record.json").read_text())
    assert "prism" not in record["seeds"].get("3", {"policies": {}})["policies"]
    assert not (tmp_path / "seed4").exists()
    (tmp_path / "slow").unlink()
    assert campaign.main([*arguments, "--seeds=3,4"], program=stage) == 0
    order = (tmp_path / "seed3" / "order").read_text().splitlines()
    ended = [line.split()[0] for line in order if line.endswith(" ends")]
    assert ended == [
        *("corpus", "evaluate_base", "sft", "evaluate_sft", "sft_grpo", "evaluate_sft_grpo"),
        *("upcycle", "pairs", "warmup", "align", "evaluate_align", "rlvr", "evaluate_rlvr"),
        *("sft_dapo", "evaluate_sft_dapo"),
    ]
    steps = [json.loads(p.read_text()) for p in (tmp_path / "seed3" / "steps").glob("*.json")]
    # The one that was interrupted began twice; the end of time may also fall between two.
    assert sum(step["num_starts"] - 1 for step in steps) in (0, 1)
    record = json.loads((tmp_path / "record.json").read_text())
    assert list(record["seeds"]) == ["3", "4"]
    found = record["seeds"]["3"]["policies"]
    assert found["prism_grpo"]["right"] == "111100"
    assert {found[name]["responses_sampled"] for name in ("sft_grpo", "prism_grpo")} == {8}
    assert found["sft_dapo"]["responses_sampled"] == 8
    assert record["seeds"]["3"]["curves"]["align"]["caption_gap"] == [1.0, 1.0]
    assert campaign_page.difference(record, "prism_grpo", "sft_grpo")["by_seed"] == {
        "3": pytest.approx(1 / 3),
        "4": pytest.approx(1 / 3),
    }


def test_wrong_arguments_are_named(tmp_path):
    for argument, told in (
        ("--seeds=a", "--seeds=a: must be whole numbers"),
        ("--policies=best", "policies must be among core"),
        ("--prisms=1", "unknown arguments --prisms=1"),
    ):
        with pytest.raises(errors.InputError, match=told):
            campaign.main([str(tmp_path), argument], program=())


def test_prompts_are_told_apart_by_the_habits_that_would_make_them_wrong():
    letters = campaign_record.skills("tiny", 0, 200)
    assert set(letters) == set("nprb")
    level = numerals_examples.level_named("tiny")
    habits = numerals_examples.Slips(perception=0.0, arithmetic=0.0, habit=1.0)
    for index, letter in enumerate(letters):
        example = numerals_examples.example(level=level, seed=0, stream="rl_test", index=index)
        is_wrong = example.public(habits).answer != example.teacher.answer
        # Two habits may cancel out: with a 9 and a zero the number of even digits is right.
        assert is_wrong == (letter != "n") or letter == "b"
        has_nine = any(mark.name == "9" for mark in example.scene.marks)
        assert has_nine or letter in "nr"


def _record(*rights):
    """Return a record in which SFT → GRPO and PRISM → GRPO have these answers, a pair a seed."""
    policies = {
        name: {"title": title, "group": "core"}
        for name, title in (("sft_grpo", "SFT → GRPO"), ("prism_grpo", "PRISM → GRPO"))
    }
    line = {"format_valid": 1.0, "response_tokens": 9.0, "digits_right": {"9": 0.5}}
    seeds = {
        str(seed): {
            "seconds": {"sft": 10.0},
            "skills": "nprb",
            "curves": {"align": {"caption_gap": [2.0 + seed, 1.0]}},
            "policies": {
                "sft_grpo": line | {"right": first, "responses_sampled": 8},
                "prism_grpo": line | {"right": second, "responses_sampled": 8},
            },
        }
        for seed, (first, second) in enumerate(rights)
    }
    return {
        "size": "demo",
        "where": "Two cores",
        "versions": {"jax": "0"},
        "policies": policies,
        "seeds": seeds,
    }


def test_the_table_is_of_paired_differences():
    record = _record(("1000", "1100"), ("1000", "1110"))
    found = campaign_page.difference(record, "prism_grpo", "sft_grpo")
    assert list(found["by_seed"].values()) == [0.25, 0.5]
    # 0.375 -+ t(1, 0.975) = 12.7062 times 0.25 / sqrt(2) / sqrt(2)
    assert found["seeds"].low == pytest.approx(0.375 - 12.7062 * 0.125, abs=1e-4)
    assert not campaign_page.is_shown(found)
    assert campaign_page.difference(record, "prism_grpo", "sft") is None
    five = _record(*[("1000", "1100")] * 4, ("1000", "1110"))
    assert campaign_page.is_shown(campaign_page.difference(five, "prism_grpo", "sft_grpo"))
    four = _record(*[("1000", "1100")] * 4)
    assert not campaign_page.is_shown(campaign_page.difference(four, "prism_grpo", "sft_grpo"))
    text = campaign_page.render(record, "file.json")
    assert "| PRISM → GRPO − SFT → GRPO | +25.0, +50.0 | +37.5 [-121.3, +196.3] |" in text
    assert (
        "| PRISM → GRPO | 2 | 62.5 [-96.3, 221.3] | 100 | 100 | 50 | 0 | 50 | 100 | 9 | 8 |" in text
    )


def test_curves_are_means_over_seeds_and_the_page_links_to_them():
    record = _record(("1000", "1100"), ("1000", "1110"))
    before, after = campaign_page.START, campaign_page.END
    texts = campaign_page.pages({"x.json": record}, f"head\n{before}\nold\n{after}\n")
    page, curves = texts.values()
    assert page.startswith("head\n")
    assert "old" not in page
    assert "(science_curves.html)" in page
    assert "caption from 2.5 at step 1 to 1 at step 2" in curves
    for seed in record["seeds"].values():
        seed["curves"] = {}
    assert len(campaign_page.pages({"x.json": record}, page)) == 1


def test_the_page_is_what_the_records_say():
    assert campaign_page.main(["--check"]) == 0
