"""Measure a policy: `python -m prism_jax evaluate --config=configs/evaluate.py:4b --workdir=DIR`.

    --config.policy.folder=…   Hugging Face folder, converted folder, or workdir of a stage
    --config.prompts.path=…    RL parquet, JSON lines, or a folder that `data build` wrote
    --config.prompts.path=…    of `data benchmark`, or a folder of several such: a suite

Every prompt is answered greedily, or several times with sampling, or both, with the sampler and the
judge of training. DIR gets `responses.jsonl`, a line per response with its segments, its reward and
the reason for it, and `summary.json` with rates and their 95 % intervals, over all prompts and by
type of question. Both files appear when they are complete; a killed run resumes where it stopped.

A benchmark is scored by its rules and in its groups, with `config.llm_judge` also by a model. A
suite evaluates each in a folder below DIR, with the policy loaded once, and writes `suite.json`;
see docs/benchmarks.md.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from prism_jax import configuration, errors, intervals, progress
from prism_jax.checkpoints import pretrained
from prism_jax.commands.ask import job as ask_job
from prism_jax.commands.ask import parts as ask_parts
from prism_jax.commands.benchmarks import grading, llm_judge, suite
from prism_jax.commands.benchmarks import tally as benchmark_tally
from prism_jax.data import records
from prism_jax.data.benchmarks import files as benchmark_files
from prism_jax.policy import responses
from prism_jax.report import results
from prism_jax.rewards import score, tags
from prism_jax.rollout import engine
from prism_jax.running import run as run_lib
from prism_jax.setup import agreement, judging
from prism_jax.setup import prompts as prompts_lib

Json = Any
_NO_TYPE = "(none)"


# The fields that a resumed job reads from the records of its earlier parts.
_RECORD = {
    "question_type": (str, type(None)),
    "response_tokens": int,
    "ended": bool,
    "format_ok": bool,
    "accuracy": float,
    "reward": float,
    "reason": frozenset(reason.value for reason in score.Reason),
    "response": str,
    "benchmark?": grading.RECORD,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.Section):
    """The configuration of `evaluate`."""

    seed: int
    policy: ask_job.Policy
    prompts: prompts_lib.Prompts
    mesh: configuration.Mesh
    has_greedy: bool  # one response per prompt, always the most likely token
    num_samples: int  # responses per prompt drawn with `sampling`; 0 disables sampling
    sampling: ask_job.Sampling
    max_tokens: int | None  # of a response; None: as the benchmark limits it
    batch_responses: int  # sampled at a time
    rewards: judging.Rewards
    llm_judge: llm_judge.LLMJudge | None  # judges a benchmark besides its rules
    # Steps between progress lines where standard error is no terminal.
    line_every_steps: int = configuration.free()

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.at_least(self, 0, "seed", "num_samples")
        problems += configuration.at_least(self, 1, "max_tokens", "batch_responses")
        problems += configuration.at_least(self, 1, "line_every_steps")
        if not self.has_greedy and self.num_samples == 0:
            problems.append("num_samples must be >= 1 when has_greedy is False, got 0")
        return problems + self.mesh.problems_of_whole_rows()


def main(argv: Sequence[str]) -> None:
    """Evaluate one policy on one data set."""
    config, workdir = configuration.read(argv, command="evaluate")
    folders = benchmark_files.suite(config.prompts.path)
    if folders:
        suite.run(
            config,
            workdir,
            folders,
            check=check,
            evaluate=run,
            open_sampler=ask_job.open_sampler,
        )
    else:
        run(config, workdir, open_sampler=ask_job.open_sampler)


def check(config: ml_collections.ConfigDict) -> None:
    """Raise InputError for a data set that `run` would refuse, without evaluating anything."""
    options = configuration.parse(Config, config)
    policy = options.policy
    source = pretrained.Source.of(policy.folder, role="policy", step=policy.step)
    _, opened = ask_job.open_rows(
        source.files, options.prompts, need_teacher=False, need_answer=True, folder=None
    )
    _check_facts(options, opened)


def run(
    config: ml_collections.ConfigDict, workdir: str, *, open_sampler: ask_job.OpenSampler
) -> dict[str, Json]:
    """Evaluate, or read the summary of a finished workdir; return the summary."""
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
            need_answer=options.rewards.custom is None,
            may_differ=configuration.free_fields(Config),
            digests=options.rewards.digests(),
        )
        summary = ask_parts.finished(folder, results.EVALUATION)
        if summary is None:
            summary = _evaluate(options, job)
            ask_parts.finish(folder, summary)
    for name in ("greedy", "samples"):
        if name in summary and jax.process_index() == 0:
            print(f"{name}: {_line(summary[name])}")
    return summary


def _check_facts(options: Config, opened: prompts_lib.Opened) -> int:
    """Return the limit of a response's tokens; refuse what only a benchmark has elsewhere."""
    facts = grading.facts_of([opened.rows[0]])
    if facts is None and options.max_tokens is None:
        raise errors.InputError("config.max_tokens must be given for data that is of no benchmark")
    if facts is None and options.llm_judge is not None:
        raise errors.InputError("config.llm_judge judges benchmarks, the data is of none")
    return options.max_tokens or facts[0].max_tokens


def _evaluate(options: Config, job: ask_job.Job) -> dict[str, Json]:
    passes = _passes(options, job, _check_facts(options, job.opened))
    model = None if options.llm_judge is None else options.llm_judge.open(job.workdir)
    tallies = {
        sampling_pass.name: Tally(num_responses=sampling_pass.num_responses)
        for sampling_pass in passes
    }
    with options.rewards.open_judge() as judge:
        lines = (
            tallies[sampling_pass.name].add(record)
            for sampling_pass in passes
            for record in _judged(
                model,
                ask_parts.ask(
                    sampling_pass,
                    job.opened,
                    job.words,
                    workdir=job.workdir,
                    key=jax.random.key(options.seed),
                    sampler=job.sampler,
                    describe=_describer(sampling_pass, options, job, judge),
                    schema=_RECORD,
                    line_every_steps=options.line_every_steps,
                ),
                sampling_pass,
                options,
                job,
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
        "judge": options.rewards.custom or options.rewards.judge,
        **({} if options.llm_judge is None else {"llm_judge": options.llm_judge.endpoint.model}),
        **counted,
    }


def _judged(
    model: llm_judge.Judge | None,
    lines: Iterator[Mapping[str, Json]],
    sampling_pass: ask_parts.Pass,
    options: Config,
    job: ask_job.Job,
) -> Iterator[Mapping[str, Json]]:
    """Return the records, which only process 0 has, with a model's verdicts if there is one."""
    if model is None or jax.process_index() != 0:
        return lines
    rows, num_responses = job.opened.rows, sampling_pass.num_responses
    return model.judged(
        lines,
        lambda number: grading.facts_of([rows[number // num_responses]])[0],
        title=f"{sampling_pass.name}, judge",
        num_records=len(rows) * num_responses,
        line_every_steps=options.line_every_steps * options.batch_responses,
    )


def _passes(options: Config, job: ask_job.Job, max_tokens: int) -> list[ask_parts.Pass]:
    ends = job.words.ids.ends
    greedy = dataclasses.replace(options.sampling, temperature=0.0, top_k=None, top_p=None)
    wanted = [("greedy", greedy, int(options.has_greedy))]
    wanted.append(("samples", options.sampling, options.num_samples))
    return [
        ask_parts.Pass(
            name=name,
            sampling=sampling.with_limit(max_tokens, ends=ends),
            num_responses=num_responses,
            batch_prompts=ask_parts.batch_prompts(
                options.batch_responses, num_responses=num_responses, row_parts=job.row_parts
            ),
        )
        for name, sampling, num_responses in wanted
        if num_responses
    ]


def _describer(
    sampling_pass: ask_parts.Pass, options: Config, job: ask_job.Job, judge: judging.SharedJudge
) -> ask_parts.Describe:
    """Return a function that grades a batch of responses and describes each in a record."""
    # The gate has the name of the judge's rule.
    reader = responses.Reader.of(
        job.words, vocab_tokens=job.vocab_tokens, gate=options.rewards.judge
    )

    def describe(
        rows: Sequence[records.PromptRow], rollout: engine.Rollout
    ) -> list[dict[str, Json]]:
        segments, each = reader.read(rollout), sampling_pass.num_responses
        facts = grading.facts_of(rows)
        if facts is None:
            rewards = judge.grade(responses.tasks(rows, segments, num_responses=each))
            graded = [(reward, None) for reward in rewards]
        else:
            graded = grading.grade(
                [one for one in facts for _ in range(each)],
                segments,
                judge,
                accuracy_weight=options.rewards.accuracy_weight,
                format_weight=options.rewards.format_weight,
            )
        return [
            _record(rows[n // each], n % each, one, reward)
            | {"draw": sampling_pass.name}
            | ({} if of_benchmark is None else {"benchmark": of_benchmark})
            for n, (one, (reward, of_benchmark)) in enumerate(zip(segments, graded, strict=True))
        ]

    return describe


def _record(
    row: records.PromptRow, number: int, response: tags.Segments, reward: score.Reward
) -> dict[str, Json]:
    question_type = row.extra_info.get("question_type")
    return {
        "id": row.id,
        "response_number": number,
        "question_type": None if question_type is None else str(question_type),
        "data_source": row.data_source,
        "ground_truth": row.ground_truth,
        "response": response.text,
        "caption": response.caption,
        "cot": response.cot,
        "answer": tags.answer_text(response.text),
        "response_tokens": response.response_tokens,
        "ended": response.ended,
        "format_ok": bool(reward.format),
        "accuracy": reward.accuracy,
        "reward": reward.total,
        "reason": reward.reason.value,
        # Of a function of the user's: its parts, or why there are none.
        **({"parts": dict(reward.parts)} if reward.parts is not None else {}),
        **({"detail": reward.detail} if reward.detail is not None else {}),
    }


class Tally:
    """The counts of one pass, whose records come prompt by prompt."""

    def __init__(self, *, num_responses: int):
        self._num_responses = num_responses
        self._records: list[dict[str, Json]] = []

    def add(self, record: Mapping[str, Json]) -> Mapping[str, Json]:
        """Count a record and return it."""
        counted = ("question_type", "response_tokens", "ended", "format_ok", "accuracy", "reward")
        entry = {name: record[name] for name in (*counted, "reason")}
        entry |= {name: record.get(name) for name in ("benchmark", "judged", "parts")}
        self._records.append(entry)
        return record

    def summary(self) -> dict[str, Json]:
        """Return the statistics as JSON values, with 95 % intervals."""
        entries = self._records
        counts = collections.Counter(record["reason"] for record in entries)
        is_custom = counts[score.Reason.SCORED] > 0
        reasons = {
            reason.value: counts[reason] for reason in (score.CUSTOM if is_custom else score.JUDGED)
        }
        scored = [record["parts"] for record in entries if record["parts"] is not None]
        each = self._num_responses
        prompts = [entries[i : i + each] for i in range(0, len(entries), each)]
        any_right = [max(r["accuracy"] for r in group) for group in prompts]
        types = collections.defaultdict(list)
        for group in prompts:
            types[group[0]["question_type"] or _NO_TYPE].append(group)
        return {
            "num_prompts": len(prompts),
            "num_responses": self._num_responses,
            **self._rates(prompts),
            "any_right": dataclasses.asdict(intervals.rate(any_right, num_responses=1)),
            "reward": _mean(entries, "reward"),
            "response_tokens": _mean(entries, "response_tokens"),
            "cut": _mean([{"cut": not record["ended"]} for record in entries], "cut"),
            "reasons": reasons,
            **({"parts": _part_means(scored)} if scored else {}),
            "by_type": {
                name: {"num_prompts": len(groups)} | self._rates(groups)
                for name, groups in sorted(types.items())
            },
            **self._of_benchmark(prompts),
        }

    def _of_benchmark(self, prompts: benchmark_tally.Prompts) -> dict[str, Json]:
        scores = benchmark_tally.summary(prompts, num_responses=self._num_responses)
        return {} if scores is None else {"benchmark": scores}

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


def _part_means(scored: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({name for parts in scored for name in parts})
    return {name: _mean([parts for parts in scored if name in parts], name) for name in names}


def _mean(entries: Sequence[Mapping[str, Json]], name: str) -> float:
    return sum(record[name] for record in entries) / len(entries)


def _line(summary: Mapping[str, Json]) -> str:
    """Write the main figures of a pass in one line."""
    accuracy, form = (intervals.Rate(**summary[name]) for name in ("accuracy", "format_valid"))
    scores = summary.get("benchmark")
    return (
        f"accuracy {accuracy}, format valid {form}, {summary['response_tokens']:.0f} tokens, "
        f"{100 * summary['cut']:.1f} % cut, {summary['num_prompts']} prompts x "
        f"{summary['num_responses']}" + ("" if scores is None else benchmark_tally.line(scores))
    )
