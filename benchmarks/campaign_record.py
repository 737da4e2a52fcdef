"""The record of a campaign: what its folders hold so far, as one JSON value.

Right answers are kept prompt by prompt, so that every interval can be computed from the record.
A prompt's `skills` say which habits of the public demonstrations would make its answer wrong:
n neither, p perception (a 9 read as 4), r reasoning (a lost carry, an odd zero), b either.
"""

import pathlib
import random
from collections.abc import Sequence
from typing import Any

from benchmarks import campaign_policies, captions_read, records
from prism_jax import configuration, errors, small_files
from prism_jax.commands.pipeline import steps as pipeline_steps
from prism_jax.data import parquet_tables
from prism_jax.data.numerals import examples as numerals_examples
from prism_jax.data.numerals import questions as numerals_questions
from prism_jax.data.numerals import scenes as numerals_scenes
from prism_jax.report import results

Json = Any
_RESPONSE = {"id": str, "draw": str, "accuracy": float, "format_ok": bool, "response_tokens": int}
_SEGMENTS = ("caption", "cot", "response")
_CURVES = ("gap", "pair_accuracy")
_ROW = {"step": int, str: small_files.NUMBER}


def skills(level: str, seed: int, rows: int) -> str:
    """Return the letter of each test prompt."""
    examples_level = numerals_examples.level_named(level)
    letters = ""
    for index in range(rows):
        example = numerals_examples.example(
            level=examples_level, seed=seed, stream="rl_test", index=index
        )
        seen = numerals_scenes.misread(example.scene, random.Random(0), rate=0.0, habit_rate=1.0)
        hasty = numerals_questions.Arithmetic(random.Random(0), rate=0.0, habit_rate=1.0)
        truth, work = example.teacher.answer, example.question.work
        is_misread = work(seen, numerals_questions.exact()).answer != truth
        is_slip = work(example.scene, hasty).answer != truth
        letters += {(0, 0): "n", (1, 0): "p", (0, 1): "r", (1, 1): "b"}[is_misread, is_slip]
    return letters


def collect(
    folder: pathlib.Path,
    *,
    size: str,
    base: str,
    overrides: Sequence[str],
    title: str,
    policies: Sequence[campaign_policies.Policy],
) -> Json:
    """Return the record of all seeds in a campaign's folder."""
    seeds = {
        path.name.removeprefix("seed"): _seed(path, policies)
        for path in sorted(folder.glob("seed*"), key=lambda path: int(path.name[4:]))
    }
    return {
        "campaign": "drift",
        "size": size,
        "base": base or "trained in the campaign",
        "overrides": list(overrides),
        "where": title,
        "versions": records.versions(),
        "policies": {
            policy.name: {"title": policy.title, "group": policy.group} for policy in policies
        },
        "seeds": {seed: found for seed, found in seeds.items() if found["policies"]},
    }


def _seed(folder: pathlib.Path, policies: Sequence[campaign_policies.Policy]) -> Json:
    """Return what one seed's folder holds."""
    steps = {}
    for path in (folder / results.STEPS_FOLDER).glob("*.json"):
        step = small_files.read(path, results.STEP)
        if step is not None and step["is_finished"]:
            steps[step["name"]] = step
    measured = {
        policy.name: _policy(folder, policy, steps)
        for policy in policies
        if policy.evaluation in steps
    }
    found = {
        "seconds": {name: round(step["seconds"], 1) for name, step in sorted(steps.items())},
        "skills": "",
        "policies": measured,
        "curves": {
            name: _curves(folder / name)
            for name, step in sorted(steps.items())
            if step["arguments"][0] == "align"
        },
    }
    if measured:
        manifest = small_files.read(
            folder / "corpus" / "manifest.json",
            {"level": str, "seed": int, "rows": {"rl_test": int}},
        )
        if manifest is None:
            raise errors.InputError(f"{folder / 'corpus'}: there is no manifest.json")
        found["skills"] = skills(manifest["level"], manifest["seed"], manifest["rows"]["rl_test"])
    return found


def _policy(folder: pathlib.Path, policy: campaign_policies.Policy, steps: dict[str, Json]) -> Json:
    """Return the answers of an evaluated policy, and what its training sampled."""
    path = folder / policy.evaluation / "responses.jsonl"
    rows = small_files.read_lines(path, _RESPONSE)
    greedy = sorted(
        (row for row in rows if row["draw"] == "greedy"),
        key=lambda row: int(row["id"].rsplit(":", 1)[1]),
    )
    if not greedy:
        raise errors.InputError(f"{path}: holds no greedy response")
    test = parquet_tables.ParquetTable(str(folder / "corpus/rl/test.parquet")).scan()
    truths = {f"test.parquet:{number}": row["teacher_caption"] for number, row in test}
    captions = [row | {"caption": row.get("caption") or ""} for row in greedy]
    found = {
        "right": "".join(str(int(row["accuracy"] == 1)) for row in greedy),
        "format_valid": sum(row["format_ok"] for row in greedy) / len(greedy),
        "response_tokens": sum(row["response_tokens"] for row in greedy) / len(greedy),
        "digits_right": captions_read.reading(truths, captions)["digit_right"],
    }
    if policy.trained is not None:
        found["responses_sampled"] = responses_sampled(folder, steps[policy.trained])
    return found


def responses_sampled(folder: pathlib.Path, step: Json) -> int:
    """Return the number of responses that a training step has sampled; 0 for SFT."""
    command, *arguments = step["arguments"]
    if command not in ("align", "rlvr"):
        return 0
    arguments = [text.replace(pipeline_steps.WORKDIR, str(folder)) for text in arguments]
    config, _ = configuration.read(arguments, command=command)
    rows = small_files.read_lines(folder / step["name"] / "metrics.jsonl", _ROW)
    prompts = config.rollout.num_prompts
    if command == "rlvr" and config.groups.generation_prompts is not None:
        prompts = config.groups.generation_prompts
    generations = sum(row.get("rollout/generations", 1) for row in rows)
    return round(generations) * prompts * config.rollout.num_responses


def _curves(folder: pathlib.Path) -> Json:
    """Return gaps and pair accuracies of alignment, step by step."""
    rows = small_files.read_lines(folder / "metrics.jsonl", _ROW)
    names = [f"{segment}_{curve}" for segment in _SEGMENTS for curve in _CURVES]
    keys = {name: f"discriminator/{name}" for name in names}
    return {
        name: [round(float(row[key]), 4) for row in rows if key in row]
        for name, key in keys.items()
        if any(key in row for row in rows)
    }
