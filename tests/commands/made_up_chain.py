"""A chain's folder with made-up numbers, for the report: nothing in it was measured.

python -m tests.commands.made_up_chain FOLDER
"""

import json
import math
import pathlib
import random
import sys

from prism_jax import intervals
from prism_jax.data.numerals import corpus as numerals_corpus
from prism_jax.data.numerals import examples as numerals_examples

TITLE = "Made-up numbers: a test of the page"
NUM_ROWS = 12
RIGHT = {"base": 1, "sft": 5, "align": 6, "rlvr": 9}  # of the rows
VALID = {"base": 0, "sft": 11, "align": 12, "rlvr": 12}


def write(folder: pathlib.Path, *, stages: tuple[str, ...] = tuple(RIGHT)) -> pathlib.Path:
    """Write the folder of a chain whose other stages were not run; return it."""
    none = dict.fromkeys(numerals_examples.STREAMS, 0)
    rows = numerals_corpus.rows_of("tiny", none | {"rl_test": NUM_ROWS})
    corpus = folder / "corpus"
    slips = numerals_corpus.slips_of("tiny", {})
    numerals_corpus.write(corpus, level="tiny", seed=0, rows=rows, slips=slips, num_processes=1)
    for stage in stages:
        _write_evaluation(folder, stage)
    rng = random.Random(0)
    if "sft" in stages:
        write_metrics(folder / "sft", [_sft_row(step, rng) for step in range(1, 301)])
    if "align" in stages:
        write_metrics(folder / "warmup", [_warmup_row(step) for step in (30, 60)])
        write_metrics(folder / "align", [_align_row(step, rng) for step in range(1, 41)])
    if "rlvr" in stages:
        write_metrics(folder / "rlvr", [_rlvr_row(step, rng) for step in range(1, 101)])
    names = ["data", "sft", "upcycle", "pairs", "warmup", "align", "rlvr", "evaluate_rlvr"]
    for number, name in enumerate(names, start=1):
        write_step(folder, name, number=number, seconds=3.7 * number**1.7)
    return folder


def write_metrics(folder: pathlib.Path, rows: list[dict]) -> None:
    """Write metrics as a stage does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_step(folder: pathlib.Path, name: str, *, number: int, seconds: float) -> None:
    """Write the record of a finished step."""
    steps = folder / "steps"
    steps.mkdir(exist_ok=True)
    record = {
        "number": number,
        "name": name,
        "arguments": [name, f"--workdir=$WORKDIR/{name}", "--config.seed=7"],
        "seconds": seconds,
        "num_starts": 2 if name == "align" else 1,
        "exit_code": 0,
        "is_finished": True,
    }
    (steps / f"{name}.json").write_text(json.dumps(record))


def _write_evaluation(folder: pathlib.Path, stage: str) -> None:
    target = folder / f"evaluate_{stage}"
    target.mkdir()
    stream = numerals_corpus.stream(level="tiny", seed=0, name="rl_test", rows=NUM_ROWS)
    lines, types = [], {}
    for number, example in enumerate(stream):
        is_right, is_valid = number < RIGHT[stage], number < VALID[stage]
        text = example.teacher.response if is_right else example.teacher.response.replace("1", "7")
        reason = "correct" if is_right else "wrong" if is_valid else "format"
        kind = example.question.type
        line = {
            "id": f"test.parquet:{number + 1}",
            "response_number": 0,
            "question_type": kind,
            "ground_truth": example.teacher.answer,
            "response": text if is_valid or is_right else "It is <b>7</b> & so on.",
            "ended": True,
            "reason": reason,
            "draw": "greedy",
        }
        lines.append(line)
        types.setdefault(kind, []).append(float(is_right))
    (target / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    greedy = {
        "num_prompts": NUM_ROWS,
        "num_responses": 1,
        "accuracy": _rate([n < RIGHT[stage] for n in range(NUM_ROWS)]),
        "format_valid": _rate([n < VALID[stage] for n in range(NUM_ROWS)]),
        "response_tokens": 61.0,
        "cut": 0.0,
        "by_type": {
            kind: {"num_prompts": len(found), "accuracy": _rate(found)}
            for kind, found in types.items()
        },
    }
    (target / "summary.json").write_text(json.dumps({"greedy": greedy}))
    path = str(folder / "corpus" / "rl" / "test.parquet")
    prompts = {"path": path, "image_root": None}
    (target / "run.json").write_text(json.dumps({"config": {"prompts": prompts}}))


def _rate(values: list) -> dict:
    found = intervals.rate([float(value) for value in values], num_responses=1)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _sft_row(step: int, rng: random.Random) -> dict:
    row = {"step": step, "loss/nll": 0.3 + 3 * math.exp(-step / 40) + 0.1 * rng.random()}
    return row | ({"eval/nll": 0.38 + 3 * math.exp(-step / 40)} if step % 50 == 0 else {})


def _warmup_row(step: int) -> dict:
    row = {"step": step, "eval/caption_pair_accuracy": 0.75, "eval/cot_pair_accuracy": 0.9}
    panel = _honesty(caption=0.75, caption_length=0.74, cot=0.9, cot_length=0.875, bits=0.02)
    # Asked here and not in alignment, as if the discriminator were told the kind here alone.
    swapped = {"honesty/cot_swapped_change": 0.625, "honesty/cot_swapped_pair_accuracy": 0.5}
    return row | panel | swapped


def _honesty(
    *, caption: float, caption_length: float, cot: float, cot_length: float, bits: float
) -> dict:
    """Return what the honesty panel tells; the length of a cot explains it where it is as high."""
    told = {"num_pairs": 48.0, "caption_score_std": 1.25}
    for name, accuracy, probe in (
        ("caption", caption, caption_length),
        ("cot", cot, cot_length),
    ):
        told |= {
            f"{name}_pair_accuracy": accuracy,
            f"{name}_teacher_cut_fraction": 0.125,
            f"{name}_length_probe_accuracy": probe,
            f"{name}_last_token_probe_accuracy": 0.5,
            f"{name}_probe_explains": float(probe >= 0.75 and probe >= accuracy - 0.02),
        }
        for expert, load in enumerate((0.1, 0.2, 0.3, 0.4)):
            told[f"{name}_expert_{expert}_load"] = load
    for change in ("blank", "shuffled", "replaced"):
        told[f"caption_{change}_image_change"] = 0.375
        told[f"caption_{change}_image_pair_accuracy"] = 0.5
    told |= {"router_information_bits_mean": bits, "router_information_bits_max": 2 * bits}
    return {f"honesty/{name}": value for name, value in told.items()}


def _align_row(step: int, rng: random.Random) -> dict:
    share = step / 40
    panel = {}
    if step in (1, 20, 40):
        panel = _honesty(
            caption=0.8, caption_length=0.6, cot=0.9 - share / 8, cot_length=0.8, bits=share / 4
        )
    return panel | {
        "step": step,
        "discriminator/caption_gap": 2.5 * math.exp(-4 * share) + 0.4 * rng.random(),
        "discriminator/cot_gap": 1.8 - share + 0.8 * rng.random(),
        "discriminator/caption_pair_accuracy": 0.8 if step <= 10 else 0.5,
        "discriminator/cot_pair_accuracy": 0.9 if step <= 30 else 0.625,
    }


def _rlvr_row(step: int, rng: random.Random) -> dict:
    accuracy = min(1.0, 0.45 + 0.003 * step + 0.08 * rng.random())
    form = 0.97 + 0.03 * rng.random()
    return {
        "step": step,
        "reward/total_mean": 0.8 * accuracy + 0.2 * form,
        "reward/accuracy_mean": accuracy,
        "reward/format_mean": form,
    }


if __name__ == "__main__":
    print(write(pathlib.Path(sys.argv[1])))
