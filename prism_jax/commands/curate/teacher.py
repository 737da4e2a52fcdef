"""Have a teacher answer prompts and keep verified replies: the second step of `curate`.

Any OpenAI-compatible chat endpoint can be the teacher. A reply is kept when its format passes the
strict gate and the strict judge accepts its answer. Nothing here needs JAX or an accelerator.

Each reply enters the cache under the hash of its request before it is examined. The files of this
step therefore follow from rows, configuration and cache; a restart, after a kill too, sends only
the requests that the cache lacks.
"""

import concurrent.futures
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from prism_jax import errors, progress, small_files
from prism_jax.checkpoints import lock
from prism_jax.commands.curate import teacher_answers, teacher_config
from prism_jax.data import prompt_files, records, sharegpt_files, sources, validate
from prism_jax.setup import dropped_rows

Json = Any
SFT_FILE = "teacher_sft.json"
ALIGN_FILE = "align.parquet"
OUTCOMES_FILE = "outcomes.jsonl"
REPORT_FILE = "report.json"


def run(
    options: teacher_config.Teacher, rows_source: sources.Source, folder: pathlib.Path
) -> dict[str, Json]:
    """Send every prompt to the teacher, write both data sets and return the report.

    A job that stops early also writes the files, from the replies so far.

    Args:
      folder: of this step, inside the workdir.

    Raises:
      InputError: configuration or data are wrong, or the endpoint refuses every request.
    """
    key = options.endpoint.key(place="config.teacher.endpoint")
    rules = validate.Rules(
        max_bad_rows=options.max_bad_rows,
        option="config.teacher.max_bad_rows",
        limit_pixels=options.limit_image_pixels,
        need_answer=True,
        count_tokens=_refuse_videos,
        max_tokens=0,
    )
    with dropped_rows.named(None):
        opened = sources.open_source(rows_source, rules, cache_dir=options.rows_cache_dir)
    dropped_rows.print_rows(opened.report, None)
    count = len(opened.rows) if options.max_rows is None else options.max_rows
    rows = sources.Selection(opened.rows, range(min(count, len(opened.rows))))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_FILE).unlink(missing_ok=True)  # it describes other files
    with options.judge.start_for_accuracy("strict") as judge:
        answers = teacher_answers.Answers(options, folder, key=key, judge=judge)
        outcomes = _ask_all(options, rows, answers)
    lock.check()
    _write(rows, outcomes, answers, options, folder, has_scales=opened.report.has_scales)
    report = answers.report(outcomes) | {"prompts_read": opened.report.summary()}
    small_files.write(folder / REPORT_FILE, report)
    if answers.fatal is not None:
        raise errors.InputError(f"{options.endpoint.model}: {answers.fatal}")
    return report


def _refuse_videos(row: records.PromptRow) -> int:
    """Raise RowError for a row with a video, which chat endpoints do not take."""
    if row.videos:
        raise records.RowError("unsupported", "a teacher is asked about pictures, not about videos")
    return 0


def _ask_all(
    options: teacher_config.Teacher, rows: sources.Rows, answers: teacher_answers.Answers
) -> list[teacher_answers.PromptOutcome]:
    shown = progress.Progress(
        sys.stderr,
        title="teacher",
        first_step=0,
        num_steps=len(rows),
        watched=("kept", "cost"),
        line_every_steps=options.line_every_steps,
    )
    outcomes: list[teacher_answers.PromptOutcome] = []
    num_kept = 0
    with concurrent.futures.ThreadPoolExecutor(options.endpoint.num_concurrent) as pool:
        waiting = [pool.submit(lambda i: answers.answer(rows[i]), i) for i in range(len(rows))]
        try:
            for number, future in enumerate(waiting, start=1):
                outcomes.append(future.result())
                lock.check()
                num_kept += outcomes[-1].outcome is teacher_answers.Outcome.KEPT
                shown.show(number, {"kept": float(num_kept), "cost": answers.budget.spent})
        except BaseException:
            # Requests under way are paid for, so keep their replies, but send no more.
            answers.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            shown.close()
    return outcomes


def _write(
    rows: sources.Rows,
    outcomes: Sequence[teacher_answers.PromptOutcome],
    answers: teacher_answers.Answers,
    options: teacher_config.Teacher,
    folder: pathlib.Path,
    *,
    has_scales: bool,
) -> None:
    """Write both data sets and the outcomes, in the order of the rows."""
    indices = [i for i, outcome in enumerate(outcomes) if outcome.key is not None]

    def answered_rows() -> Iterator[records.PromptRow]:
        for i in indices:
            yield teacher_answers.answered(rows[i], answers.cache.get(outcomes[i].key).text.strip())

    sharegpt_files.write(folder / SFT_FILE, map(_demonstration, answered_rows()))
    infos = [
        dict(outcomes[i].info)
        | {"teacher_model": options.endpoint.model, "teacher_tries": len(outcomes[i].tries)}
        for i in indices
    ]
    prompt_files.write(
        folder / ALIGN_FILE, answered_rows(), infos=infos, has_scales=has_scales, has_videos=False
    )
    lines = (
        {
            "id": outcome.id,
            "outcome": outcome.outcome.value,
            "tries": outcome.tries,
            "detail": outcome.detail,
        }
        for outcome in outcomes
    )
    small_files.replace(
        folder / OUTCOMES_FILE, b"".join(small_files.dumps(line) + b"\n" for line in lines)
    )


def _demonstration(row: records.PromptRow) -> records.SFTRow:
    response = records.Message(role="assistant", content=row.teacher_response)
    return records.SFTRow(
        id=row.id, source=row.source, messages=(*row.prompt, response), images=row.images
    )
