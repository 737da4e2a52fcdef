"""Curate data: `python -m prism_jax curate --config=configs/curate.py:4b --workdir=DIR`.

    --config.difficulty.policy.folder=…    Hugging Face folder, converted folder, or workdir
    --config.difficulty.prompts.path=…     RL parquet, JSON lines, or a folder of `data build`
    --config.teacher.endpoint.base_url=…   of any OpenAI-compatible chat endpoint
    --config.teacher.endpoint.model=…      its key comes from the environment, see docs/curate.md

Two steps, each usable alone (`:4b,difficulty`, `:4b,teacher`); a killed step resumes where it
stopped:

1. `DIR/difficulty`: the policy's pass rate on each prompt decides which prompts go to RL and which
   to the teacher (`difficulty.py`).
2. `DIR/teacher`: the teacher answers those, and its verified answers become demonstrations and
   prompts for alignment (`teacher.py`).
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from prism_jax import configuration, errors, progress
from prism_jax.checkpoints import mirror
from prism_jax.commands.ask import job as ask_job
from prism_jax.commands.curate import difficulty, teacher, teacher_config
from prism_jax.data import sources
from prism_jax.running import run as run_lib
from prism_jax.setup import agreement, corpora

Json = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.Section):
    """The configuration of `curate`; a step that is None is skipped."""

    difficulty: difficulty.Difficulty | None
    teacher: teacher_config.Teacher | None


def main(argv: Sequence[str]) -> None:
    """Run one step or both."""
    config, workdir = configuration.read(argv, command="curate")
    run(config, workdir, open_sampler=ask_job.open_sampler)


def run(
    config: ml_collections.ConfigDict, workdir: str, *, open_sampler: ask_job.OpenSampler
) -> dict[str, Json]:
    """Run the steps that are configured and return their summaries by name."""
    options = configuration.parse(Config, config)
    if options.difficulty is None and options.teacher is None:
        raise errors.InputError("config.difficulty and config.teacher: one must be given")
    if options.teacher is not None:
        teacher_config.check_rows(options.teacher, has_difficulty=options.difficulty is not None)
        options.teacher.endpoint.key(
            place="config.teacher.endpoint"
        )  # a missing key must fail now, not after hours of sampling
    summaries: dict[str, Json] = {}
    mesh = None if options.difficulty is None else options.difficulty.mesh
    is_distributed = None if mesh is None else mesh.is_distributed
    with run_lib.hold(workdir, kind="curate", is_distributed=is_distributed) as folder:
        if options.difficulty is not None:
            first = folder / "difficulty"
            summaries["difficulty"] = difficulty.run(
                options.difficulty, config.difficulty, first, open_sampler=open_sampler
            )
            _print(first / difficulty.RL_FILE)
        if options.teacher is not None:
            if options.difficulty is not None and summaries["difficulty"]["num_hard"] == 0:
                progress.say("no prompt is hard enough for the teacher")
                return summaries
            second = folder / "teacher"
            # The teacher is behind an address, and one process is enough to ask it.
            summaries["teacher"] = agreement.on_first(
                "teacher",
                lambda: teacher.run(options.teacher, _rows(options.teacher, folder), second),
            )
            _say(summaries["teacher"])
            _print(second / teacher.SFT_FILE)
            _print(second / teacher.ALIGN_FILE)
    return summaries


def _print(path: pathlib.Path) -> None:
    if jax.process_index() == 0:
        print(mirror.address(path))


def _rows(options: teacher_config.Teacher, folder: pathlib.Path) -> sources.Source:
    """Return the prompts for the teacher: those of the configuration, else the hard ones."""
    if options.prompts is None:
        path = folder / "difficulty" / difficulty.HARD_FILE
        return sources.Source(kind="prompts", path=str(path))
    return corpora.source(
        options.prompts.path, kind="prompts", image_root=options.prompts.image_root or ""
    )


def _say(report: dict[str, Json]) -> None:
    counts = ", ".join(f"{name} {count}" for name, count in report["prompts"].items() if count)
    progress.say(f"of {report['num_prompts']} prompts: {counts}")
    paid, known = report["this_start"], report["whole_cache"]
    progress.say(
        f"{paid['input_tokens']:,} tokens in, {paid['output_tokens']:,} out, cost "
        f"{paid['cost']:.4g} now and {known['cost']:.4g} in all"
    )
    if not report["complete"]:
        why = "" if report["stopped"] is None else f" ({report['stopped']})"
        progress.say(f"not complete{why}: the same command sends the missing requests")
