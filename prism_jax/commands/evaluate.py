"""Measure a policy: `python -m prism_jax evaluate --config=configs/evaluate.py:4b --workdir=DIR`.

    --config.policy.folder=…   Hugging Face folder, converted folder, or workdir of a stage
    --config.prompts.path=…    RL parquet, JSON lines, or a folder that `data build` wrote

Every prompt is asked greedily, or several times, or both, by the sampler and the judge of training.
DIR gets `responses.jsonl`, one line a response with its segments and why it earned what it earned,
and `summary.json` with rates and their 95 % intervals, over all and by type of question. Both
appear when they are complete; a killed run goes on where it was.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections

from prism_jax import configuration, intervals, progress
from prism_jax.commands.ask import job as ask_job
from prism_jax.commands.ask import parts as ask_parts
from prism_jax.data import records
from prism_jax.policy import responses
from prism_jax.report import results
from prism_jax.rewards import score, tags
from prism_jax.rollout import engine
from prism_jax.running import run as run_lib
from prism_jax.setup import agreement, judging
from prism_jax.setup import prompts as prompts_lib

Json = Any
_NO_TYPE = "(none)"
_GATES: dict[str, tags.Gate] = {"strict": "strict", "official": "official"}


# What is needed of a record in the parts of a job that was interrupted.
_RECORD = {
    "question_type": (str, type(None)),
    "response_tokens": int,
    "ended": bool,
    "format_ok": bool,
    "accuracy": float,
    "reward": float,
    "reason": frozenset(reason.value for reason in score.Reason),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.Section):
    """Hold the configuration of `evaluate`."""

    seed: int
    policy: ask_job.Policy
    prompts: prompts_lib.Prompts
    mesh: configuration.Mesh
    has_greedy: bool  # ask each prompt once, always with the most likely token
    num_samples: int  # ask each prompt so often with `sampling`; 0: not at all
    sampling: ask_job.Sampling
    max_tokens: int  # of a response
    batch_responses: int  # drawn at a time
    rewards: judging.Rewards
    # Steps between progress lines where standard error is no terminal.
    line_every_steps: int = configuration.free()

    def problems(self) -> list[str]:
        """See `Section`."""
        found = configuration.at_least(self, 0, "seed", "num_samples")
        found += configuration.at_least(self, 1, "max_tokens", "batch_responses")
        found += configuration.at_least(self, 1, "line_every_steps")
        if not self.has_greedy and self.num_samples == 0:
            found.append("num_samples must be >= 1 when has_greedy is False, got 0")
        return found


def main(argv: Sequence[str]) -> None:
    """Evaluate one policy on one data set."""
    config, workdir = configuration.read(argv, command="evaluate")
    run(config, workdir, open_sampler=ask_job.open_sampler)


def run(
    config: ml_collections.ConfigDict, workdir: str, *, open_sampler: ask_job.OpenSampler
) -> dict[str, Json]:
    """Evaluate and return the summary; a workdir that has one returns it."""
    options = configuration.parse(Config, config)
    is_distributed = options.mesh.is_distributed
    with run_lib.hold(workdir, kind="answers", is_distributed=is_distributed) as folder:
        job = ask_job.begin(
            "evaluate",
            config,
            policy=options.policy,
            prompts=options.prompts,
            mesh=options.mesh,
            workdir=folder,
            open_sampler=open_sampler,
            need_teacher=False,
            need_answer=True,
            may_differ=configuration.free_fields(Config),
        )
        summary = ask_parts.finished(folder, results.EVALUATION)
        if summary is None:
            summary = _evaluate(options, job)
            ask_parts.finish(folder, summary)
    for name in ("greedy", "samples"):
        if name in summary and jax.process_index() == 0:
            print(f"{name}: {_line(summary[name])}")
    return summary


def _evaluate(options: Config, job: ask_job.Job) -> dict[str, Json]:
    passes = _passes(options, job)
    tallies = {one.name: Tally(num_responses=one.num_responses) for one in passes}
    with options.rewards.open_judge() as judge:
        lines = (
            tallies[one.name].add(record)
            for one in passes
            for record in ask_parts.ask(
                one,
                job.opened,
                job.words,
                workdir=job.workdir,
                key=jax.random.key(options.seed),
                sampler=job.sampler,
                describe=_describer(one, options, job, judge),
                schema=_RECORD,
                line_every_steps=options.line_every_steps,
            )
        )
        ask_parts.write_lines(job.workdir / "responses.jsonl", lines)
        if judge.num_restarts:
            progress.say(f"{judge.num_restarts} judging processes were killed or died")
    counted = agreement.on_first(
        "summary", lambda: {name: tally.summary() for name, tally in tallies.items()}
    )
    return {
        "policy": {"folder": options.policy.folder, **job.identity.model_config},
        "prompts": {"path": options.prompts.path} | job.opened.report.summary(),
        "judge": options.rewards.judge,
        **counted,
    }


def _passes(options: Config, job: ask_job.Job) -> list[ask_parts.Pass]:
    ends = job.words.ids.ends
    greedy = dataclasses.replace(options.sampling, temperature=0.0, top_k=None, top_p=None)
    wanted = [("greedy", greedy, int(options.has_greedy))]
    wanted.append(("samples", options.sampling, options.num_samples))
    return [
        ask_parts.Pass(
            name=name,
            sampling=sampling.with_limit(options.max_tokens, ends=ends),
            num_responses=num_responses,
            batch_prompts=ask_parts.batch_prompts(
                options.batch_responses, num_responses=num_responses, row_parts=job.row_parts
            ),
        )
        for name, sampling, num_responses in wanted
        if num_responses
    ]


def _describer(
    asked: ask_parts.Pass, options: Config, job: ask_job.Job, judge: judging.SharedJudge
) -> ask_parts.Describe:
    """Return the function that judges a batch and writes its records."""
    gate = _GATES[options.rewards.judge]
    reader = responses.Reader.of(job.words, vocab_tokens=job.vocab_tokens, gate=gate)

    def describe(
        rows: Sequence[records.PromptRow], rollout: engine.Rollout
    ) -> list[dict[str, Json]]:
        segments = reader.read(rollout)
        rewards = judge.grade(responses.tasks(rows, segments, num_responses=asked.num_responses))
        return [
            _record(rows[n // asked.num_responses], n % asked.num_responses, one, reward)
            | {"draw": asked.name}
            for n, (one, reward) in enumerate(zip(segments, rewards, strict=True))
        ]

    return describe


def _record(
    row: records.PromptRow, number: int, one: tags.Segments, reward: score.Reward
) -> dict[str, Json]:
    question_type = row.extra_info.get("question_type")
    return {
        "id": row.id,
        "response_number": number,
        "question_type": None if question_type is None else str(question_type),
        "data_source": row.data_source,
        "ground_truth": row.ground_truth,
        "response": one.text,
        "caption": one.caption,
        "cot": one.cot,
        "answer": tags.answer_text(one.text),
        "response_tokens": one.response_tokens,
        "ended": one.ended,
        "format_ok": bool(reward.format),
        "accuracy": reward.accuracy,
        "reward": reward.total,
        "reason": reward.reason.value,
    }


class Tally:
    """Count the records of one pass, which come prompt by prompt."""

    def __init__(self, *, num_responses: int):
        self._num_responses = num_responses
        self._records: list[dict[str, Json]] = []

    def add(self, record: Mapping[str, Json]) -> Mapping[str, Json]:
        """Count a record and return it."""
        counted = ("question_type", "response_tokens", "ended", "format_ok", "accuracy", "reward")
        self._records.append({name: record[name] for name in (*counted, "reason")})
        return record

    def summary(self) -> dict[str, Json]:
        """Return the numbers as JSON values; the intervals are those of 95 %."""
        found = self._records
        reasons = dict.fromkeys((reason.value for reason in score.Reason), 0)
        for record in found:
            reasons[record["reason"]] += 1
        each = self._num_responses
        prompts = [found[i : i + each] for i in range(0, len(found), each)]
        any_right = [max(r["accuracy"] for r in group) for group in prompts]
        types = collections.defaultdict(list)
        for group in prompts:
            types[group[0]["question_type"] or _NO_TYPE].append(group)
        return {
            "num_prompts": len(prompts),
            "num_responses": self._num_responses,
            **self._rates(prompts),
            "any_right": dataclasses.asdict(intervals.rate(any_right, num_responses=1)),
            "reward": _mean(found, "reward"),
            "response_tokens": _mean(found, "response_tokens"),
            "cut": _mean([{"cut": not record["ended"]} for record in found], "cut"),
            "reasons": reasons,
            "by_type": {
                name: {"num_prompts": len(groups)} | self._rates(groups)
                for name, groups in sorted(types.items())
            },
        }

    def _rates(self, prompts: Sequence[Sequence[Mapping[str, Json]]]) -> dict[str, Json]:
        names = {"accuracy": "accuracy", "format_valid": "format_ok"}
        return {
            name: dataclasses.asdict(
                intervals.rate(
                    [_mean(group, field) for group in prompts], num_responses=self._num_responses
                )
            )
            for name, field in names.items()
        }


def _mean(found: Sequence[Mapping[str, Json]], name: str) -> float:
    return sum(record[name] for record in found) / len(found)


def _line(told: Mapping[str, Json]) -> str:
    """Return what a user wants to see of a pass."""
    accuracy, form = (intervals.Rate(**told[name]) for name in ("accuracy", "format_valid"))
    return (
        f"accuracy {accuracy}, format valid {form}, {told['response_tokens']:.0f} tokens, "
        f"{100 * told['cut']:.1f} % cut, {told['num_prompts']} prompts x {told['num_responses']}"
    )
