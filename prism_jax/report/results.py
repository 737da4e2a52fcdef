"""The results in a chain's folder: rates per stage, curves and wall time; None if missing.

A chain's folder has a folder per step, named as `prism_jax.commands.pipeline.steps` names them:

    steps/NAME.json            command, wall seconds, whether it has finished
    sft, align, rlvr, warmup   metrics.jsonl
    evaluate_STAGE             summary.json, responses.jsonl, run.json
"""

import dataclasses
import math
import operator
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from prism_jax import errors, intervals, small_files

Json = Any

STAGES = ("base", "sft", "align", "rlvr")
_CUT, _WHOLE = ("caption", "cot"), ("response",)  # segments; GAD uses the whole response
STEPS_FOLDER = "steps"
REPORT = "report"  # the step that reads the others; it does not report itself
# The discriminator's accuracy is averaged over the first and the last steps of alignment: at most
# this number and a quarter of all, since a policy may match its teacher in the first half.
_WINDOWSTEPS = 10
_WINDOW_PARTS = 4
# The areas with metrics of a segment's pairs.
_MEASURED = ("discriminator", "eval")
_RATE = {"mean": float, "low": float, "high": float}
_PASS = {
    "num_prompts": int,
    "num_responses": int,
    "accuracy": _RATE,
    "format_valid": _RATE,
    "response_tokens": float,
    "cut": float,
    "by_type": {str: {"num_prompts": int, "accuracy": _RATE}},
}
# `summary.json` of an evaluation.
EVALUATION = {"greedy?": _PASS, "samples?": _PASS}
_IDENTITY = {"config": {"prompts": {"path": str, "image_root": (str, type(None))}}}
# A row of `metrics.jsonl`, and the record of a chain's step.
_ROW = {"step": int, str: small_files.NUMBER}
STEP = {
    "number": int,
    "name": str,
    "arguments": [str],
    "seconds": float,
    "num_starts": int,
    "is_finished": bool,
}
# A line of `responses.jsonl`.
RESPONSE = {
    "id": str,
    "draw": str,
    "response_number": int,
    "question_type": (str, type(None)),
    "ground_truth": (str, type(None)),
    "response": str,
    "reason": str,
    "ended": bool,
}
# Arguments that need no quotes.
_PLAIN = re.compile(r"(?:\$WORKDIR|[\w@%+=:,./-]|(?<!^)#)+")
_SEED = re.compile(r"--(?:config\.)?seed=(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """The values of a metric with their steps; all are finite."""

    steps: tuple[int, ...]
    values: tuple[float, ...]
    num_not_finite: int  # steps whose value was NaN or infinite, which are left out


@dataclasses.dataclass(frozen=True, kw_only=True)
class TypeRates:
    """The accuracy on a type of question."""

    num_prompts: int
    accuracy: intervals.Rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results of `evaluate` for a policy."""

    draw: str  # "greedy", or "samples" if there is no greedy draw
    num_prompts: int
    num_responses: int  # to each prompt
    accuracy: intervals.Rate
    format_valid: intervals.Rate
    response_tokens: float
    cut: float  # fraction of responses that reached the limit of tokens
    by_type: Mapping[str, TypeRates]
    prompts_path: str
    image_root: str | None
    responses: pathlib.Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The record of a step of the chain."""

    name: str
    arguments: tuple[str, ...]
    seconds: float  # wall time over all its starts
    num_starts: int
    is_finished: bool

    @property
    def command(self) -> str:
        """Return the step's command for a shell; `$WORKDIR` stands for the chain's folder."""
        return " ".join(("python -m prism_jax", *map(_quoted, self.arguments)))

    @property
    def seed(self) -> int | None:
        """Return the seed in the command."""
        seeds = [match[1] for match in map(_SEED.fullmatch, self.arguments) if match]
        return int(seeds[-1]) if seeds else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """The content of a chain's page, without the responses."""

    workdir: pathlib.Path
    evaluations: Mapping[str, Evaluation | None]  # by stage
    metrics: Mapping[str, Sequence[Mapping[str, Json]]]  # rows of metrics.jsonl by step's name
    steps: Sequence[Step]

    def curve(self, step: str, metric: str) -> Curve:
        """Return a metric of a training step; empty if it was never measured."""
        points = [(row["step"], float(row[metric])) for row in self.metrics[step] if metric in row]
        finite = [(number, value) for number, value in points if math.isfinite(value)]
        return Curve(
            steps=tuple(number for number, _ in finite),
            values=tuple(value for _, value in finite),
            num_not_finite=len(points) - len(finite),
        )

    def absent(self, step: str) -> str:
        """Return the text for a metric that is missing in a training step's rows."""
        return "not measured" if self.metrics[step] else "not run"

    def is_empty(self) -> bool:
        """Return whether the folder holds no result of a chain."""
        has_evaluation = any(evaluation is not None for evaluation in self.evaluations.values())
        return not (has_evaluation or any(self.metrics.values()) or self.steps)


def read(workdir: pathlib.Path) -> Results:
    """Read a chain's folder, finished or not.

    Raises:
      InputError: the folder does not exist, or a file in it is not in its stage's format.
    """
    if not workdir.is_dir():
        raise errors.InputError(f"--workdir={workdir}: no such folder")
    return Results(
        workdir=workdir,
        evaluations={stage: _evaluation(workdir / f"evaluate_{stage}") for stage in STAGES},
        metrics={
            name: small_files.read_lines(workdir / name / "metrics.jsonl", _ROW)
            for name in ("base", "sft", "warmup", "align", "rlvr")
        },
        steps=_steps(workdir / STEPS_FOLDER),
    )


def summary(chain: Results) -> dict[str, Json]:
    """Return the content of `summary.json`; None (null) stands for a stage that was not run."""
    evaluations = chain.evaluations
    finished = [step for step in chain.steps if step.is_finished]
    return {
        "accuracy": {
            stage: None if evaluation is None else dataclasses.asdict(evaluation.accuracy)
            for stage, evaluation in evaluations.items()
        },
        "format_valid": {
            stage: None if evaluation is None else dataclasses.asdict(evaluation.format_valid)
            for stage, evaluation in evaluations.items()
        },
        "evaluated": {
            stage: None
            if evaluation is None
            else {
                "draw": evaluation.draw,
                "num_prompts": evaluation.num_prompts,
                "num_responses": evaluation.num_responses,
            }
            for stage, evaluation in evaluations.items()
        },
        "discriminator_pair_accuracy": pair_accuracy(chain),
        "wall_seconds": {step.name: round(step.seconds, 1) for step in finished},
        "num_starts": {step.name: step.num_starts for step in finished},
        "commands": {step.name: step.command for step in finished},
        "seeds": {step.name: step.seed for step in finished if step.seed is not None},
    }


def segments(chain: Results) -> tuple[str, ...]:
    """Return the segments that the discriminator read, from the names of its metrics."""
    rows = [*chain.metrics["align"], *chain.metrics["warmup"]]
    keys = set().union(*rows)

    def are_read(names: Sequence[str]) -> bool:
        return any(f"{part}/{name}_pair_accuracy" in keys for name in names for part in _MEASURED)

    if not are_read(_WHOLE):
        return _CUT
    return (*(_CUT if are_read(_CUT) else ()), *_WHOLE)


def pair_accuracy(chain: Results) -> dict[str, Json]:
    """Return how often the discriminator scored a teacher's segment above the policy's.

    "before" and "after" are means over the first and the last steps of alignment, on the responses
    of those steps, which it scores before it learns from them; "warmup_held_out" is the warm-up's
    last value on held-out pairs.
    """
    accuracies: dict[str, Json] = {
        "before": {},
        "after": {},
        "warmup_held_out": {},
        "steps_averaged": None,
    }
    rows = chain.metrics["align"]
    last_step = rows[-1]["step"] if rows else 0
    window = min(_WINDOWSTEPS, max(last_step // _WINDOW_PARTS, 1 if last_step > 1 else 0))
    if window:
        accuracies["steps_averaged"] = window
    for name in segments(chain):
        curve = chain.curve("align", f"discriminator/{name}_pair_accuracy")
        pairs = list(zip(curve.steps, curve.values, strict=True))
        accuracies["before"][name] = _mean([v for step, v in pairs if step <= window])
        accuracies["after"][name] = _mean([v for step, v in pairs if step > last_step - window])
        held_out = chain.curve("warmup", f"eval/{name}_pair_accuracy")
        accuracies["warmup_held_out"][name] = held_out.values[-1] if held_out.values else None
    return accuracies


def _evaluation(folder: pathlib.Path) -> Evaluation | None:
    summary = small_files.read(folder / "summary.json", EVALUATION)
    if summary is None:
        return None
    run = small_files.read(folder / "run.json", _IDENTITY)
    draw = next((name for name in ("greedy", "samples") if name in summary), None)
    if run is None or draw is None:
        missing = "run.json" if run is None else "the result of `evaluate` in summary.json"
        raise errors.InputError(f"{folder}: {missing} is missing")
    rates, prompts = summary[draw], run["config"]["prompts"]
    return Evaluation(
        draw=draw,
        num_prompts=rates["num_prompts"],
        num_responses=rates["num_responses"],
        accuracy=_rate(rates["accuracy"]),
        format_valid=_rate(rates["format_valid"]),
        response_tokens=rates["response_tokens"],
        cut=rates["cut"],
        by_type={
            name: TypeRates(num_prompts=of_type["num_prompts"], accuracy=_rate(of_type["accuracy"]))
            for name, of_type in rates["by_type"].items()
        },
        prompts_path=prompts["path"],
        image_root=prompts["image_root"],
        responses=folder / "responses.jsonl",
    )


def _rate(values: Mapping[str, float]) -> intervals.Rate:
    return intervals.Rate(mean=values["mean"], low=values["low"], high=values["high"])


def _steps(folder: pathlib.Path) -> list[Step]:
    """Return the steps of the chain that were started, in order."""
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    records = [small_files.read(path, STEP) for path in paths]
    return [
        Step(
            name=record["name"],
            arguments=tuple(record["arguments"]),
            seconds=record["seconds"],
            num_starts=record["num_starts"],
            is_finished=record["is_finished"],
        )
        for record in sorted(records, key=operator.itemgetter("number"))
        if record["name"] != REPORT
    ]


def _quoted(argument: str) -> str:
    """Return an argument quoted for a shell, which still expands `$WORKDIR`."""
    if _PLAIN.fullmatch(argument):
        return argument
    return shlex.quote(argument).replace("$WORKDIR", "'\"$WORKDIR\"'")


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
