"""The difficulty of each prompt for a policy: the first step of `curate`.

Each prompt gets `num_samples` responses from the sampler and the judge of training. Its pass rate,
the share of right responses, decides which sets it belongs to:

    rl.parquet     rl_above < rate < rl_below: a group of responses that are all right or all wrong
                   gives RL no gradient
    hard.parquet   rate <= hard_at_most: the prompts for a teacher

Source: the paper, section on data: RL prompts are filtered by difficulty (pass rate), and
the teacher answers prompts that current models do not solve. It gives no thresholds; k is ours too.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from prism_jax import configuration, errors, progress, small_files
from prism_jax.commands.ask import job as ask_job
from prism_jax.commands.ask import parts as ask_parts
from prism_jax.data import prompt_files, records
from prism_jax.policy import responses
from prism_jax.rewards import score
from prism_jax.rollout import engine
from prism_jax.setup import agreement, judging
from prism_jax.setup import prompts as prompts_lib

Json = Any
RATES_FILE = "rates.jsonl"
RL_FILE = "rl.parquet"
HARD_FILE = "hard.parquet"
_SUMMARY_FILE = "summary.json"  # as `commands.ask.parts` calls it
_THRESHOLDS = ("rl_above", "rl_below", "hard_at_most")
# The fields that are read from a line of the rates, and from the summary.
_RATE = {"pass_rate": float, "num_samples": int, "reasons": {str: int}}
_SUMMARY = {
    "thresholds": {str: float},
    "num_prompts": int,
    "never_right": int,
    "always_right": int,
    "num_rl": int,
    "num_hard": int,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difficulty(configuration.Section):
    """The configuration of this step."""

    seed: int
    policy: ask_job.Policy
    prompts: prompts_lib.Prompts
    mesh: configuration.Mesh
    sampling: ask_job.Sampling
    num_samples: int  # of each prompt
    max_tokens: int  # of a response
    batch_responses: int  # sampled at a time
    judge: judging.Judge
    rl_above: float = configuration.free()
    rl_below: float = configuration.free()
    hard_at_most: float = configuration.free()
    # Steps between progress lines where standard error is no terminal.
    line_every_steps: int = configuration.free()

    def problems(self) -> list[str]:
        """See `Section`."""
        names = ("num_samples", "max_tokens", "batch_responses", "line_every_steps")
        problems = configuration.at_least(self, 0, "seed") + configuration.at_least(self, 1, *names)
        if self.sampling.temperature == 0 and self.num_samples > 1:
            problems.append(
                "num_samples must be 1 when sampling.temperature is 0: all are the same"
            )
        if self.rl_above >= self.rl_below:
            problems.append(
                f"rl_above must be < rl_below, got {self.rl_above:g} and {self.rl_below:g}"
            )
        return problems + self.mesh.problems_of_whole_rows()


def run(
    options: Difficulty,
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    *,
    open_sampler: ask_job.OpenSampler,
) -> dict[str, Json]:
    """Measure each prompt, write both sets and return the summary.

    The rates stay on disk: other thresholds select new sets without sampling again.

    Args:
      config: the configuration that `options` was parsed from.
      folder: of this step, inside the workdir.
    """
    folder.mkdir(exist_ok=True)
    job = ask_job.begin(
        "curate",
        config,
        policy=options.policy,
        prompts=options.prompts,
        mesh=options.mesh,
        workdir=folder,
        open_sampler=open_sampler,
        need_teacher=False,
        need_answer=True,
        may_differ=configuration.free_fields(Difficulty),
        place="config.difficulty",
    )
    thresholds = {name: dataclasses.asdict(options)[name] for name in _THRESHOLDS}
    summary = ask_parts.finished(folder, _SUMMARY)
    if summary is None or summary["thresholds"] != thresholds:
        path = folder / RATES_FILE

        def has_rates() -> bool:
            # By process 0 alone: a slower one might remove the summary that is written next.
            (folder / _SUMMARY_FILE).unlink(missing_ok=True)  # it describes other sets
            return path.exists()

        if not agreement.on_first("rates", has_rates):
            with options.judge.open() as judge:
                ask_parts.write_lines(path, _measure(options, job, judge))
        selected = agreement.on_first("select", lambda: _select(options, job))
        summary = selected | {"thresholds": thresholds}
        ask_parts.finish(folder, summary)
    progress.say(
        f"of {summary['num_prompts']} prompts {summary['never_right']} are never right and "
        f"{summary['always_right']} always, in {options.num_samples} samples; "
        f"{summary['num_rl']} for RL, {summary['num_hard']} for a teacher"
    )
    return summary


def _measure(
    options: Difficulty, job: ask_job.Job, judge: judging.SharedJudge
) -> Iterator[dict[str, Json]]:
    """Yield a line per prompt, in the order of the rows."""
    each = options.num_samples
    # The gate has the name of the judge's rule.
    reader = responses.Reader.of(job.words, vocab_tokens=job.vocab_tokens, gate=options.judge.rule)

    def describe(
        rows: Sequence[records.PromptRow], rollout: engine.Rollout
    ) -> list[dict[str, Json]]:
        segments = reader.read(rollout)
        rewards = judge.grade(responses.tasks(rows, segments, num_responses=each))
        lengths = [one.response_tokens for one in segments]
        cut = [not one.ended for one in segments]
        groups = [slice(n * each, (n + 1) * each) for n in range(len(rows))]
        return [
            _line(row, rewards[group], lengths[group], cut[group])
            for row, group in zip(rows, groups, strict=True)
        ]

    sampling_pass = ask_parts.Pass(
        name="samples",
        sampling=options.sampling.with_limit(options.max_tokens, ends=job.words.ids.ends),
        num_responses=each,
        batch_prompts=ask_parts.batch_prompts(
            options.batch_responses, num_responses=each, row_parts=job.row_parts
        ),
    )
    yield from ask_parts.ask(
        sampling_pass,
        job.opened,
        job.words,
        workdir=job.workdir,
        key=jax.random.key(options.seed),
        sampler=job.sampler,
        describe=describe,
        schema=_RATE,
        line_every_steps=options.line_every_steps,
    )


def _line(
    row: records.PromptRow,
    rewards: Sequence[score.Reward],
    lengths: Sequence[int],
    cut: Sequence[bool],
) -> dict[str, Json]:
    return {
        "id": row.id,
        "pass_rate": sum(one.accuracy for one in rewards) / len(rewards),
        "num_samples": len(rewards),
        "response_tokens": sum(lengths) / len(lengths),
        "cut": sum(cut) / len(cut),
        "reasons": score.count_reasons(rewards),
    }


def _select(options: Difficulty, job: ask_job.Job) -> dict[str, Json]:
    """Write the sets that follow from the rates on disk and return the counts."""
    lines = small_files.read_lines(job.workdir / RATES_FILE, _RATE)
    if len(lines) != len(job.opened.rows):
        raise errors.InputError(
            f"{job.workdir / RATES_FILE}: damaged: {len(lines)} lines for {len(job.opened.rows)} "
            "prompts; delete it to sample them again"
        )
    rates = [one["pass_rate"] for one in lines]
    rl = [i for i, rate in enumerate(rates) if options.rl_above < rate < options.rl_below]
    hard = [i for i, rate in enumerate(rates) if rate <= options.hard_at_most]
    for name, indices in ((RL_FILE, rl), (HARD_FILE, hard)):
        infos = [_info(job.opened.rows[i], lines[i]) for i in indices]
        rows = (job.opened.rows[i] for i in indices)
        prompt_files.write(
            job.workdir / name,
            rows,
            infos=infos,
            has_scales=job.opened.report.has_scales,
            has_videos=job.opened.report.has_videos,
        )
    reasons: collections.Counter[str] = collections.Counter()
    for line in lines:
        reasons.update(line["reasons"])
    steps = [n / options.num_samples for n in range(options.num_samples + 1)]
    return {
        "policy": {"folder": options.policy.folder, **job.identity.model_config},
        "prompts": {"path": options.prompts.path} | job.opened.report.summary(),
        "judge": options.judge.rule,
        "num_prompts": len(rates),
        "num_samples": options.num_samples,
        "pass_rate": sum(rates) / len(rates),
        "prompts_by_pass_rate": {f"{step:g}": rates.count(step) for step in steps},
        "never_right": rates.count(0.0),
        "always_right": rates.count(1.0),
        "num_rl": len(rl),
        "num_hard": len(hard),
        "reasons": {reason.value: reasons[reason] for reason in score.JUDGED},
    }


def _info(row: records.PromptRow, line: Mapping[str, Json]) -> dict[str, Json]:
    rate = {"pass_rate": line["pass_rate"], "pass_rate_samples": line["num_samples"]}
    return dict(row.extra_info) | rate
