"""Evaluate a policy on several benchmarks: each in a folder, and a table of all of them."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections

from prism_jax import errors, progress, small_files
from prism_jax.checkpoints import model_files
from prism_jax.commands.benchmarks import tally
from prism_jax.setup import agreement

Json = Any
FILE = "suite.json"
Check = Callable[[ml_collections.ConfigDict], None]
Evaluate = Callable[..., dict[str, Json]]  # (config, workdir, open_sampler=)
OpenSampler = Callable[..., Any]
_HEAD = ("benchmark", "prompts", "score", "rules", "with judge")


def run(
    config: ml_collections.ConfigDict,
    workdir: str,
    folders: Mapping[str, str],
    *,
    check: Check,
    evaluate: Evaluate,
    open_sampler: OpenSampler,
) -> dict[str, Json]:
    """Evaluate each data set in WORKDIR/NAME; finished ones are read. Return the table.

    All are of one policy: of a run that goes on, the step at which the first was evaluated.

    Args:
      folders: data sets by name.
      check: refuses a data set; called for all that are not finished before any is evaluated, so
        that a prompt that is too long is not met after hours.
    """
    if "://" in workdir:
        raise errors.InputError(f"--workdir={workdir}: a suite is kept in a local (mounted) folder")
    for name, folder in folders.items():
        if not pathlib.Path(workdir, name, "summary.json").exists():
            check(_part(config, folder, config.policy.step))
    share = _Shared(open_sampler)
    rows: dict[str, Json] = {}
    step = config.policy.step
    for number, (name, folder) in enumerate(folders.items(), start=1):
        progress.say(f"{name} ({number} of {len(folders)})")
        part = _part(config, folder, step)
        summary = evaluate(part, str(pathlib.Path(workdir, name)), open_sampler=share)
        if step in (None, "best") and model_files.is_run(config.policy.folder):
            step = summary["policy"]["step"]
        rows[name] = {one: summary[one] for one in ("greedy", "samples") if one in summary}
        content = {"policy": summary["policy"], "benchmarks": rows}
        agreement.on_first(
            "suite",
            lambda content=content: small_files.write(pathlib.Path(workdir, FILE), content),
        )
    if jax.process_index() == 0:
        print(table(rows))
    return content


def _part(
    config: ml_collections.ConfigDict, folder: str, step: int | str | None
) -> ml_collections.ConfigDict:
    """Return the configuration of one benchmark."""
    part = ml_collections.ConfigDict(config)
    part.prompts.path = folder
    with part.unlocked():
        part.policy.step = step
    return part


class _Shared:
    """A sampler that is opened once for all benchmarks of a policy."""

    def __init__(self, open_sampler: OpenSampler):
        self._open_sampler = open_sampler
        self._key: Any = None
        self._sampler: Any = None

    def __call__(self, source: Any, policy: Any, devices: Any) -> Any:
        """See `commands.ask.job.OpenSampler`."""
        key = (str(source.folder), source.step)
        if self._key != key:
            self._sampler = self._open_sampler(source, policy, devices)
            self._key = key
        return self._sampler


def table(rows: Mapping[str, Json]) -> str:
    """Return the scores of all benchmarks as lines of text."""
    lines = [_HEAD, *cells(rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def cells(rows: Mapping[str, Json]) -> list[tuple[str, ...]]:
    """Return a line of cells for each score of each benchmark and pass."""
    lines = []
    for name, passes in rows.items():
        for draw, summary in passes.items():
            scores = summary.get("benchmark")
            by_rules = {"accuracy": summary["accuracy"]}
            judged: Mapping[str, Json] = {}
            if scores is not None:
                by_rules |= scores["rules"]["groups"]
            if scores is not None and scores["judged"] is not None:
                judged = {"accuracy": scores["judged"]["accuracy"]} | scores["judged"]["groups"]
            title = name if len(passes) == 1 else f"{name} ({draw})"
            for score, value in by_rules.items():
                verdict = str(tally.rate(judged[score])) if score in judged else "-"
                prompts = str(value.get("num_groups", summary["num_prompts"]))
                lines.append((title, prompts, score, str(tally.rate(value)), verdict))
            if scores is not None and scores["guessed"]:
                guessed = f"{100 * scores['guessed']:.1f} %"
                lines.append((title, str(summary["num_prompts"]), "guessed", guessed, "-"))
    return lines
