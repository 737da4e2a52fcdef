"""How hard is each prompt for a policy: the first step of `curate`.

Every prompt is asked `num_samples` times with the sampler and the judge of training. Its pass rate,
the share of right responses, decides which sets it belongs to:

    rl.parquet     rl_above < rate < rl_below: a group of responses that are all right or all wrong
                   teaches RL nothing
    hard.parquet   rate <= hard_at_most: what a teacher is to answer

Source: the paper, section on data: RL prompts are filtered by difficulty (pass rate), the teacher
answers what current models do not solve. It gives no thresholds; k is ours too.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import ml_collections

from prism_jax import configuration
from prism_jax.data import prompt_files, records
from prism_jax.rewards import score, tags, workers
from prism_jax.rollout import engine
from prism_jax.stages import asking, responses, sampled, setup

Json = Any
RATES_FILE = "rates.jsonl"
RL_FILE = "rl.parquet"
HARD_FILE = "hard.parquet"
_SUMMARY_FILE = "summary.json"  # as `asking` calls it
_THRESHOLDS = ("rl_above", "rl_below", "hard_at_most")
_GATES: dict[str, tags.Gate] = {"strict": "strict", "official": "official"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge(configuration.Section):
    """Say how responses are judged; see `rewards.workers.JudgePool`."""

    rule: Literal["strict", "official"]
    num_workers: int
    deadline_seconds: float
    memory_bytes: int  # of a worker

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 1, "num_workers", "memory_bytes")

    def open(self) -> workers.JudgePool:
        """Start the judging processes; what they say of the format is not part of a pass."""
        return workers.JudgePool(
            score.Rule(judge=self.rule, accuracy_weight=1.0, format_weight=0.0),
            num_workers=self.num_workers,
            deadline_seconds=self.deadline_seconds,
            memory_bytes=self.memory_bytes,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difficulty(configuration.Section):
    """Hold the configuration of this step."""

    seed: int
    policy: sampled.Policy
    prompts: sampled.Prompts
    mesh: configuration.Mesh
    sampling: sampled.Sampling
    num_samples: int  # of each prompt
    max_tokens: int  # of a response
    batch_responses: int  # drawn at a time
    judge: Judge
    rl_above: float
    rl_below: float
    hard_at_most: float
    line_every_steps: int  # between progress lines where standard error is no terminal

    def problems(self) -> list[str]:
        """See `Section`."""
        names = ("num_samples", "max_tokens", "batch_responses", "line_every_steps")
        found = configuration.at_least(self, 0, "seed") + configuration.at_least(self, 1, *names)
        if self.sampling.temperature == 0 and self.num_samples > 1:
            found.append("num_samples must be 1 when sampling.temperature is 0: all are the same")
        if self.rl_above >= self.rl_below:
            found.append(
                f"rl_above must be < rl_below, got {self.rl_above:g} and {self.rl_below:g}"
            )
        return found


def run(
    options: Difficulty,
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    *,
    open_sampler: sampled.OpenSampler,
) -> dict[str, Json]:
    """Measure every prompt, write both sets and return the summary.

    What was sampled is kept: with other thresholds the sets are written anew, nothing is asked.

    Args:
      config: what `options` was read from.
      folder: of this step, inside the workdir.
    """
    folder.mkdir(exist_ok=True)
    job = sampled.begin(
        "curate",
        config,
        policy=options.policy,
        prompts=options.prompts,
        mesh=options.mesh,
        workdir=folder,
        open_sampler=open_sampler,
        need_teacher=False,
        need_answer=True,
        may_differ=("judge.num_workers", *_THRESHOLDS),
        place="config.difficulty",
    )
    thresholds = {name: dataclasses.asdict(options)[name] for name in _THRESHOLDS}
    summary = asking.finished(folder)
    if summary is None or summary["thresholds"] != thresholds:
        (folder / _SUMMARY_FILE).unlink(missing_ok=True)  # it tells of other sets
        path = folder / RATES_FILE
        if not path.exists():
            with options.judge.open() as judge:
                asking.write_lines(path, _measure(options, job, judge))
        summary = _select(options, job) | {"thresholds": thresholds}
        asking.finish(folder, summary)
    setup.say(
        f"of {summary['num_prompts']} prompts {summary['never_right']} are never right and "
        f"{summary['always_right']} always, in {options.num_samples} samples; "
        f"{summary['num_rl']} for RL, {summary['num_hard']} for a teacher"
    )
    return summary


def _measure(
    options: Difficulty, job: sampled.Job, judge: workers.JudgePool
) -> Iterator[dict[str, Json]]:
    """Yield a line a prompt, in the order of the rows."""
    each = options.num_samples
    gate = _GATES[options.judge.rule]
    reader = responses.Reader.of(job.words, vocab_tokens=job.vocab_tokens, gate=gate)

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

    asked = asking.Pass(
        name="samples",
        sampling=options.sampling.with_limit(options.max_tokens, ends=job.words.ids.ends),
        num_responses=each,
        batch_prompts=asking.batch_prompts(
            options.batch_responses, num_responses=each, row_parts=job.row_parts
        ),
    )
    yield from asking.ask(
        asked,
        job.opened,
        job.words,
        workdir=job.workdir,
        key=jax.random.key(options.seed),
        sampler=job.sampler,
        describe=describe,
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


def _select(options: Difficulty, job: sampled.Job) -> dict[str, Json]:
    """Write the sets that the rates on disk ask for and return the counts."""
    with (job.workdir / RATES_FILE).open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    rates = [one["pass_rate"] for one in found]
    rl = [i for i, rate in enumerate(rates) if options.rl_above < rate < options.rl_below]
    hard = [i for i, rate in enumerate(rates) if rate <= options.hard_at_most]
    for name, chosen in ((RL_FILE, rl), (HARD_FILE, hard)):
        infos = [_info(job.opened.rows[i], found[i]) for i in chosen]
        rows = (job.opened.rows[i] for i in chosen)
        prompt_files.write(job.workdir / name, rows, infos=infos)
    reasons: collections.Counter[str] = collections.Counter()
    for one in found:
        reasons.update(one["reasons"])
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
        "reasons": {reason.value: reasons[reason] for reason in score.Reason},
    }


def _info(row: records.PromptRow, line: Mapping[str, Json]) -> dict[str, Json]:
    told = {"pass_rate": line["pass_rate"], "pass_rate_samples": line["num_samples"]}
    return dict(row.extra_info) | told
