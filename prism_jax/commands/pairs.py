"""Make warm-up pairs: `python -m prism_jax pairs --config=configs/pairs.py:4b --workdir=DIR`.

    --config.policy.folder=…   the student: Hugging Face folder, converted folder, or workdir
    --config.prompts.path=…    rows with teacher_caption and teacher_cot

The policy responds to each prompt. Each well-formed response becomes a line of `DIR/pairs.jsonl`,
beside the teacher's segments, in the published form:

    {"prompt", "image", "teacher_caption", "student_caption", "teacher_cot", "student_cot"}

Pictures are in `DIR/images`, once each. `DIR/summary.json` counts the responses by outcome. All
files appear when they are complete; a killed run resumes where it stopped.

The form cannot mark one segment as not worth comparing, so a response with a segment equal to the
teacher's is left out. `has_equal_segments` keeps those of which only one segment is equal.

Source: PRISM moe/train_moe_vl_warmup_fast.py:104-155 reads this form.
"""

import collections
import dataclasses
import enum
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from prism_jax import configuration, progress
from prism_jax.checkpoints import mirror
from prism_jax.commands.ask import job as ask_job
from prism_jax.commands.ask import parts as ask_parts
from prism_jax.data import image_files, pairs, prompts, records, validate
from prism_jax.policy import responses
from prism_jax.rewards import tags
from prism_jax.rollout import engine
from prism_jax.running import run as run_lib
from prism_jax.setup import agreement
from prism_jax.setup import prompts as prompts_lib

Json = Any
_FILE = "pairs.jsonl"


class Reason(enum.StrEnum):
    """Why a response became a pair or did not: the first reason that holds."""

    MANY_IMAGES = "many_images"  # the form has place for one
    MANY_TURNS = "many_turns"  # the form has place for one question
    CUT = "cut"  # by the limit of tokens
    FORMAT = "format"
    UNREADABLE = "unreadable"  # the reader of pairs refuses it: it holds a special token's name
    EQUAL = "equal"  # a segment equals the teacher's
    REPEATED = "repeated"  # the same student segments were written for this prompt already
    KEPT = "kept"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.Section):
    """The configuration of `pairs`."""

    seed: int
    policy: ask_job.Policy
    prompts: prompts_lib.Prompts
    mesh: configuration.Mesh
    sampling: ask_job.Sampling
    num_responses: int  # per prompt
    max_tokens: int  # of a response
    batch_responses: int  # sampled at a time
    has_equal_segments: bool  # keep a response of which one segment equals the teacher's
    # Steps between progress lines where standard error is no terminal.
    line_every_steps: int = configuration.free()

    def problems(self) -> list[str]:
        """See `Section`."""
        names = ("num_responses", "max_tokens", "batch_responses", "line_every_steps")
        problems = configuration.at_least(self, 0, "seed") + configuration.at_least(self, 1, *names)
        return problems + self.mesh.problems_of_whole_rows()


def main(argv: Sequence[str]) -> None:
    """Write the pairs of one policy and one data set."""
    config, workdir = configuration.read(argv, command="pairs")
    run(config, workdir, open_sampler=ask_job.open_sampler)


def run(
    config: ml_collections.ConfigDict, workdir: str, *, open_sampler: ask_job.OpenSampler
) -> dict[str, Json]:
    """Write the pairs, or read the summary of a finished workdir; return the summary."""
    options = configuration.parse(Config, config)
    is_distributed = options.mesh.is_distributed
    with run_lib.hold(workdir, kind="answers", is_distributed=is_distributed) as folder:
        job = ask_job.begin(
            "pairs",
            config,
            policy=options.policy,
            prompts=options.prompts,
            mesh=options.mesh,
            workdir=folder,
            open_sampler=open_sampler,
            need_teacher=True,
            need_answer=False,
            may_differ=configuration.free_fields(Config),
        )
        summary = ask_parts.finished(folder, {"num_responses": int, "responses": {str: int}})
        if summary is None:
            summary = _write(options, job)
            ask_parts.finish(folder, summary)
    counts = ", ".join(f"{name} {count}" for name, count in summary["responses"].items() if count)
    progress.say(f"of {summary['num_responses']} responses: {counts}")
    if jax.process_index() == 0:
        print(mirror.address(folder / _FILE))
    return summary


def _write(options: Config, job: ask_job.Job) -> dict[str, Json]:
    reader = responses.Reader.of(job.words, vocab_tokens=job.vocab_tokens, gate="strict")

    def describe(
        rows: Sequence[records.PromptRow], rollout: engine.Rollout
    ) -> list[dict[str, Json]]:
        if jax.process_index() != 0:
            return []  # process 0 writes, the pictures too
        segments = reader.read(rollout)
        each = options.num_responses
        return [
            record
            for n, row in enumerate(rows)
            for record in _describe_row(
                row, segments[n * each : (n + 1) * each], options, job.workdir
            )
        ]

    sampling_pass = ask_parts.Pass(
        name="pairs",
        sampling=options.sampling.with_limit(options.max_tokens, ends=job.words.ids.ends),
        num_responses=options.num_responses,
        batch_prompts=ask_parts.batch_prompts(
            options.batch_responses, num_responses=options.num_responses, row_parts=job.row_parts
        ),
    )
    counts: collections.Counter[str] = collections.Counter()

    def kept_pairs() -> Iterator[Mapping[str, Json]]:
        for record in ask_parts.ask(
            sampling_pass,
            job.opened,
            job.words,
            workdir=job.workdir,
            key=jax.random.key(options.seed),
            sampler=job.sampler,
            describe=describe,
            schema={
                "reason": frozenset(reason.value for reason in Reason),
                "has_other_system": bool,
                "pair": (dict, type(None)),
            },
            line_every_steps=options.line_every_steps,
        ):
            counts[record["reason"]] += 1
            counts["other_system"] += record["has_other_system"]
            if record["pair"] is not None:
                yield record["pair"]

    ask_parts.write_lines(job.workdir / _FILE, kept_pairs())
    counts = collections.Counter(agreement.on_first("counts", lambda: dict(counts)))
    return {
        "policy": {"folder": options.policy.folder, **job.identity.model_config},
        "prompts": {"path": options.prompts.path} | job.opened.report.summary(),
        "num_prompts": len(job.opened.rows),
        "num_responses": sum(counts[reason] for reason in Reason),
        "num_pairs": counts[Reason.KEPT],
        "responses": {reason.value: counts[reason] for reason in Reason},
        # The form has no system turn; the warm-up puts the published one in front of every pair.
        "responses_under_another_system_turn": counts["other_system"],
    }


def _describe_row(
    row: records.PromptRow,
    segments: Sequence[tags.Segments],
    options: Config,
    workdir: pathlib.Path,
) -> list[dict[str, Json]]:
    """Return a record for each response to a row: its reason and, if kept, its pair."""
    written: set[tuple[str, str]] = set()
    result = []
    for response in segments:
        pair = {
            "prompt": _question(row),
            "teacher_caption": row.teacher_caption,
            "student_caption": response.caption,
            "teacher_cot": row.teacher_cot,
            "student_cot": response.cot,
        }
        reason = _reason(row, response, pair, written, options)
        if reason is Reason.KEPT:
            written.add((response.caption, response.cot))
            pair |= {"image": image_files.reference(row.images[0], workdir)} if row.images else {}
            if row.videos:
                pair["video"] = image_files.video_reference(row.videos[0], workdir)
        result.append(
            {
                "id": row.id,
                "reason": reason.value,
                "has_other_system": _system(row) != prompts.SYSTEM_PROMPT,
                "pair": pair if reason is Reason.KEPT else None,
            }
        )
    return result


def _reason(
    row: records.PromptRow,
    response: tags.Segments,
    pair: Mapping[str, Json],
    written: set[tuple[str, str]],
    options: Config,
) -> Reason:
    if len(row.images) > 1 or len(row.videos) > 1:
        return Reason.MANY_IMAGES
    if sum(turn.role == "user" for turn in row.prompt) > 1:
        return Reason.MANY_TURNS
    if not response.ended:
        return Reason.CUT
    if not response.format_ok:
        return Reason.FORMAT
    if not _is_readable(pair):
        return Reason.UNREADABLE
    equal = [
        pair[f"student_{name}"].strip() == pair[f"teacher_{name}"].strip()
        for name in ("caption", "cot")
    ]
    if all(equal) or (any(equal) and not options.has_equal_segments):
        return Reason.EQUAL
    return Reason.REPEATED if (response.caption, response.cot) in written else Reason.KEPT


def _is_readable(pair: Mapping[str, Json]) -> bool:
    """Return whether the warm-up will read the pair, with or without a picture."""
    try:
        texts = {name: records.without_marks(text) for name, text in pair.items()}
        marks = [name for name in texts if name != "prompt" and texts[name] != pair[name]]
        place = records.Place(file=_FILE, row=1)
        validate.check_row(pairs.parse(texts, place=place, source=_FILE), validate.Rules())
    except records.RowError:
        return False
    return not marks


def _question(row: records.PromptRow) -> str:
    """Return the user's text without an image mark at its head, which this form implies."""
    (first, *_) = (turn.content for turn in row.prompt if turn.role == "user")
    is_marked = len(row.images) == 1 and not row.videos and first.startswith(records.IMAGE_MARK)
    return first.removeprefix(records.IMAGE_MARK) if is_marked else first


def _system(row: records.PromptRow) -> str | None:
    return row.prompt[0].content if row.prompt[0].role == "system" else None
